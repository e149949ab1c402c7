-- How far the background auditor is: one row, so that a restart goes on where the last one stopped. A pass is over when
-- the cursor has gone once through all keys.
create table audit_progress (
    only_row            boolean primary key default true check (only_row),
    cursor_security_id  text collate "C" not null default '',
    cursor_portfolio_id text collate "C" not null default '',
    started_at          timestamptz not null default clock_timestamp(),  -- of the pass under way
    keys                bigint not null default 0,                       -- of the pass under way
    differences         bigint not null default 0,                       -- of the pass under way
    full_pass_at        timestamptz                                      -- when the last pass was over
);
insert into audit_progress default values;
