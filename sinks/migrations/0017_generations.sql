-- expand: the gate, its row, and the list of generations; workers of before wait at the gate until a newer one opens it.

-- Which database this is. One row, which every statement that draws a number looks at, and hardly anything writes.
-- instance: the server process and files whose writes are let in; null: none. fence: the offset of the fence in the topic
-- tidemark-generation with which it was let in. first_epoch: of positions that are new.
create table installation (
    only_row    boolean primary key default true check (only_row),
    instance    text,
    fence       bigint  not null default -1,
    generation  int     not null default 0,
    first_epoch int     not null default 0
);
insert into installation default values;

-- How far it has published: the highest number counts, a row for each round of the relay. No sequence, which would run
-- ahead of what it counts, and no counter in one row, which a long snapshot elsewhere would make slow.
create table relay_rounds (
    round bigint primary key
);

-- Where the output partitions ended at some round that is not long past, as {"topic/partition": offset}. One row.
create table relay_positions (
    only_row  boolean primary key default true check (only_row),
    positions jsonb   not null default '{}'
);
insert into relay_positions default values;

-- A row for each time that commits were lost which had been published.
create table generations (
    generation int         primary key,
    began_at   timestamptz not null default clock_timestamp(),
    fence      bigint      not null,
    round      bigint      not null,  -- the last one that the database knew
    lost_round bigint      not null,  -- the last one that was published
    keys       bigint      not null,  -- positions announced anew
    jobs       bigint      not null   -- whose statuses had been published since
);

-- Another server process or other files give another name: a restart, a promoted standby, a restored backup, a copy.
create function this_instance() returns text language sql stable
    return format('%s %s', extract(epoch from pg_postmaster_start_time()),
                  pg_relation_filepath('tidemark.installation'::regclass));

-- Until a worker has compared with Kafka what this database knows, no number is drawn and no offset moves. The error is of
-- a class that every worker waits out; `table` tells it from others of its class.
create function require_confirmed() returns trigger language plpgsql security definer set search_path = pg_catalog as $$
begin
    if not exists (select from tidemark.installation where instance = tidemark.this_instance()) then
        raise exception using errcode = 'cannot_connect_now', schema = 'tidemark', table = 'installation',
            message = 'this server was started, restored or promoted, and no worker has confirmed yet that it has lost nothing';
    end if;
    return null;
end
$$;

create trigger require_confirmed before insert on outbox_events execute function require_confirmed();
create trigger require_confirmed before insert on corrections execute function require_confirmed();
create trigger require_confirmed before insert or update on kafka_offsets execute function require_confirmed();

-- A position that is new after everything was announced anew begins above all epochs that may have been seen of it.
create function first_epoch() returns int language sql stable
    return (select first_epoch from tidemark.installation);
alter table position_state alter column epoch set default first_epoch();
