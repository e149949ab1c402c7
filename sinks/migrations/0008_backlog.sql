-- The backlog, counted once for all who ask: what looking costs does not grow with those who look.
create table backlog (
    part       text primary key,                           -- 'ledger': the corrections; 'keys': what is dirty
    counted_at timestamptz not null default '-infinity',
    again_at   timestamptz not null default '-infinity',   -- not to be counted again before
    took       float8[] not null default '{}',             -- seconds, of the last looks
    found      jsonb                                       -- null: never counted yet
);
insert into backlog (part) values ('ledger'), ('keys');
