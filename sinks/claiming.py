"""SQL: how partitions are claimed and given up, and how claims that came to nothing are counted.

A worker that dies writes nothing. So it is the next claim that sees whether the one before moved the offset, and the
owner that gives a claim up in order that says so beforehand.
"""

from __future__ import annotations

# A claim that moved the offset was fruitful. One that its owner gave up in order, or that had nothing to read, says
# nothing.
CLAIM = """
with place as materialized (
    select * from unnest($2::text[], $3::int[], $4::bigint[], $5::bigint[]) as p (topic, partition, log_start, log_end)
)
insert into kafka_offsets as o (consumer_group, topic, partition, next_offset, epoch, claimed_from, released)
select $1, topic, partition, log_start, 1, log_start, false from place
order by topic collate "C", partition
on conflict (consumer_group, topic, partition) do update set
    epoch = o.epoch + 1, claimed_from = o.next_offset, released = false,
    barren = case when o.next_offset <> o.claimed_from then 0
                  when o.released or o.next_offset >= (
                      select log_end from place where place.topic = o.topic and place.partition = o.partition)
                  then o.barren
                  else o.barren + 1 end
returning topic, partition, next_offset, epoch, barren
"""

# A row that is locked has a transaction on the way, which moves its offset.
RELEASE = """
update kafka_offsets set released = true
from (select consumer_group, topic, partition from kafka_offsets
      join unnest($2::text[], $3::int[], $4::bigint[]) as claim (topic, partition, epoch)
          using (topic, partition, epoch)
      where consumer_group = $1 and not released
      for no key update of kafka_offsets skip locked) as mine
where kafka_offsets.consumer_group = mine.consumer_group and kafka_offsets.topic = mine.topic
  and kafka_offsets.partition = mine.partition
"""
