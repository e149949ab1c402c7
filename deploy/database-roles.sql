-- Least privileges in Postgres: a group for each role of Tidemark. Run by the schema's owner after each `tidemark migrate`;
-- running it again is harmless. Then give each worker a user of its own:
--     create user intake_worker password '…' in role tidemark_intake;
-- The table `reach` is nobody's: triggers of the owner keep it. Everybody reads everything: any worker may be the one that counts the backlog and reports the lag. What each writes is
-- listed table by table. `tidemark_operator` is for people: actions, repairs, the outbox; `tidemark_reader` for audits.

do $$
declare
    name text;
begin
    foreach name in array array['reader', 'worker', 'intake', 'triggers', 'resets', 'books', 'operator'] loop
        if not exists (select from pg_roles where rolname = 'tidemark_' || name) then
            execute format('create role %I nologin', 'tidemark_' || name);
        end if;
    end loop;
end
$$;

grant tidemark_reader to tidemark_worker, tidemark_operator;
grant tidemark_worker to tidemark_intake, tidemark_triggers, tidemark_resets, tidemark_books;

grant usage on schema tidemark to tidemark_reader;
grant select on all tables in schema tidemark to tidemark_reader;
grant select on all sequences in schema tidemark to tidemark_reader;
grant usage on all sequences in schema tidemark to tidemark_worker, tidemark_operator;

-- Every worker: says that it is there; counts the backlog when it is due.
grant insert, update, delete on tidemark.workers to tidemark_worker;
grant insert, update on tidemark.backlog to tidemark_worker;
-- And lets its server's writes in, once it has seen that nothing was lost (docs/operating.md#generations).
grant update on tidemark.installation to tidemark_worker, tidemark_operator;

-- intake: the calendar, prices, transactions and their histories; issues corrections.
grant insert on tidemark.business_dates, tidemark.corrected_prices, tidemark.outbox_events to tidemark_intake;
grant insert, update on
    tidemark.kafka_offsets, tidemark.market_prices, tidemark.transactions, tidemark.securities, tidemark.position_state,
    tidemark.position_history, tidemark.corrections to tidemark_intake;
grant insert, delete on tidemark.lots_after_split to tidemark_intake;

grant insert, update, delete on tidemark.suspects to tidemark_intake;

-- resets: watermarks, jobs, the limit.
grant insert on tidemark.outbox_events to tidemark_resets;
grant insert, update on
    tidemark.kafka_offsets, tidemark.reprocessing_jobs, tidemark.reset_limit, tidemark.securities to tidemark_resets;
grant update on tidemark.position_state, tidemark.corrections to tidemark_resets;
grant insert, update, delete on tidemark.suspects to tidemark_resets;

-- books: valuation, the relay, corrections that were lost, histories to be booked anew after an upgrade, what is old.
grant insert, update, delete on
    tidemark.daily_position_snapshots, tidemark.outbox_events, tidemark.audit_progress to tidemark_books;
grant insert, update on
    tidemark.corrections, tidemark.securities, tidemark.history_horizons to tidemark_books;
grant insert, update on tidemark.position_state to tidemark_books;
grant insert, update, delete on tidemark.correction_changes, tidemark.correction_values to tidemark_books;
grant update, delete on tidemark.reprocessing_jobs to tidemark_books;
grant insert, update, delete on tidemark.position_history to tidemark_books;
grant insert, delete on tidemark.lots_after_split to tidemark_books;
grant insert on tidemark.operator_actions to tidemark_books;
-- A new generation: numbers go on above what was published, and claims of before are fenced out.
grant update on tidemark.kafka_offsets to tidemark_books;
grant insert on tidemark.generations to tidemark_books;
grant insert, delete on tidemark.relay_rounds to tidemark_books;
grant update on tidemark.relay_positions to tidemark_books;
grant update on sequence tidemark.outbox_events_id_seq, tidemark.correction_seq to tidemark_books;

-- triggers: its table is in Kafka; here are only what the console's actions do.
grant insert on tidemark.outbox_events, tidemark.operator_actions to tidemark_triggers;
grant insert, update on tidemark.corrections, tidemark.securities, tidemark.reset_limit to tidemark_triggers;
grant update on tidemark.reprocessing_jobs, tidemark.position_state to tidemark_triggers;

-- operators: `tidemark pause`, `throttle`, `jobs`, `reprocess`, `audit --repair`, `outbox`.
grant insert on tidemark.operator_actions to tidemark_operator;
grant insert, update on
    tidemark.corrections, tidemark.securities, tidemark.reset_limit, tidemark.position_state to tidemark_operator;
grant update on tidemark.reprocessing_jobs to tidemark_operator;
grant insert, update, delete on tidemark.outbox_events to tidemark_operator;
