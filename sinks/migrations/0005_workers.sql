-- Who works: every worker reports here every few seconds, so that any console can show all of them and the state of
-- each. A hint for people and for metrics; nothing decides by it.
create unlogged table workers (
    worker_id         uuid        primary key,
    role              text        not null,
    host              text        not null,
    pid               int         not null,
    web_url           text        not null,
    started_at        timestamptz not null,
    seen_at           timestamptz not null,
    missing           text,        -- what keeps it from being ready; null: ready
    partitions        text[]      not null,  -- topic:partition, assigned now
    restore_remaining bigint      not null, -- changelog records still to be read
    keys_reset        bigint      not null, -- since it started
    keys_valued       bigint      not null
) with (fillfactor = 50);
