-- expand: how claims ended, and the record that a partition in trial is at; workers of before write neither.

-- Where the last claim began, whether its owner gave it up in order, and how many claims in a row ended without progress
-- although records waited. Written by claims alone, so an owner that dies need not write anything.
alter table kafka_offsets
    add column claimed_from bigint not null default 0,
    add column released boolean not null default true,
    add column barren int not null default 0;

-- One open row per partition in trial: the offset that is being read, named before it is read. deaths: failures of it that
-- count, since another record had passed just before (vouched). neighbours: how often another record was tried.
create table suspects (
    consumer_group text        not null,
    topic          text        not null,
    partition      int         not null,
    record_offset  bigint      not null,
    deaths         int         not null default 0,
    vouched        boolean     not null default false,
    neighbours     int         not null default 0,
    failure        text,
    condemned_at   timestamptz
);
create unique index suspects_open on suspects (consumer_group, topic, partition) where condemned_at is null;
create index suspects_condemned on suspects (topic, condemned_at) where condemned_at is not null;
