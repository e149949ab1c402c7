-- expand: indexes and functions; workers of the version before go on with what they know, if more slowly at a held key.

-- A message key may have any length, an index entry may not: keys are looked up by digest, then compared.
drop index outbox_events_held;
drop index outbox_events_replays;
drop index outbox_events_waiting;
create index outbox_events_held on outbox_events (topic, sha256(message_key), id) where held_at is not null;
create index outbox_events_replays on outbox_events (sha256(message_key), id) where replay is not null;
-- The relay reads rows and replays in order of their ids, each by itself: neither passes over the other.
create index outbox_events_waiting on outbox_events (id) where held_at is null and replay is null;
create index outbox_events_replays_waiting on outbox_events (id) where held_at is null and replay is not null;

-- The message key of a position: portfolio_id|security_id, with a backslash before each bar and backslash of an id, so
-- that no two positions share one (sinks.model.position_key).
create function position_key(portfolio_id text, security_id text) returns bytea language sql stable
    return convert_to(replace(replace(portfolio_id, '\', '\\'), '|', '\|') || '|'
                      || replace(replace(security_id, '\', '\\'), '|', '\|'), 'UTF8');

-- The event ids that were drawn for places first_place to last_place of a replay, in order; blocks: [first id, count].
create function replayed_ids(blocks jsonb, first_place int, last_place int) returns bigint[] language sql stable
    return array(
        select block.first_id + place - block.before - 1
        from (
            select (each.block ->> 0)::bigint as first_id, (each.block ->> 1)::int as size,
                   (sum((each.block ->> 1)::int) over (order by each.number) - (each.block ->> 1)::int)::int as before
            from jsonb_array_elements(blocks) with ordinality as each (block, number)
        ) as block
        cross join lateral generate_series(greatest(block.before + 1, first_place),
                                           least(block.before + block.size, last_place)) as place
        order by place);
