-- Cost states beside the history, so that a rebuild starts at the last row it keeps; replays that the relay expands;
-- rows of the outbox that are held back; bitemporal questions; the horizon of retention.

-- The cost state after each transaction (semantics, Positions), never rounded. exact_* are null where the rounded
-- column is exact. Lots are consumed oldest first, so the open ones after a row are: what is left of the head, and every
-- lot that a later row opened. A split multiplies the lots before it when they are read: no lot is ever rewritten.
alter table position_history
    add column transaction_date   timestamptz,
    add column exact_quantity     numeric,
    add column exact_cost_basis   numeric,
    add column exact_realized     numeric,
    add column head_sequence      int,      -- of the row that opened the oldest open lot; 0: none; null: state unknown
    add column head_quantity      numeric,  -- what is left of it, splits included
    add column head_cost          numeric,
    add column lot_quantity       numeric,  -- the lot that this transaction opened, as it was opened
    add column lot_cost           numeric,
    add column split_ratio        numeric;

-- Rows from before have no cost state: such a key is computed from its first transaction at its next change.
update position_history h set transaction_date = t.transaction_date
from transactions t
where t.transaction_id = h.transaction_id and h.superseded_epoch is null;

drop table cost_states;

create index position_history_lots on position_history (security_id, portfolio_id, sequence)
    where superseded_epoch is null and lot_quantity is not null;
create index position_history_splits on position_history (security_id, portfolio_id, sequence)
    where superseded_epoch is null and split_ratio is not null;
create index position_history_superseded on position_history (superseded_at) where superseded_epoch is not null;

-- The lots that rows (after, upto] of the live history opened, oldest first, until they make up `needed` units as they
-- are counted at `upto`; and every split among those rows. The comparison is approximate, on the safe side.
create function open_lots(security text, portfolio text, after int, upto int, needed numeric)
    returns table (sequence int, lot_quantity numeric, lot_cost numeric, split_ratio numeric)
    language plpgsql stable as $$
declare
    split   record;
    lot     record;
    places  int[]     := '{}';
    ratios  numeric[] := '{}';
    place   int       := 1;
    factor  numeric   := 1;
    missing numeric   := needed * 1.000000001;
begin
    for split in
        select h.sequence, h.split_ratio from position_history h
        where h.security_id = security and h.portfolio_id = portfolio and h.superseded_epoch is null
          and h.split_ratio is not null and h.sequence > after and h.sequence <= upto
        order by h.sequence
    loop
        places := places || split.sequence;
        ratios := ratios || split.split_ratio;
        factor := factor * split.split_ratio;
        return query select split.sequence, null::numeric, null::numeric, split.split_ratio;
    end loop;
    for lot in
        select h.sequence, h.lot_quantity, h.lot_cost from position_history h
        where h.security_id = security and h.portfolio_id = portfolio and h.superseded_epoch is null
          and h.lot_quantity is not null and h.sequence > after and h.sequence <= upto
        order by h.sequence
    loop
        while place <= cardinality(places) and places[place] < lot.sequence loop
            factor := factor / ratios[place];
            place := place + 1;
        end loop;
        return query select lot.sequence, lot.lot_quantity, lot.lot_cost, null::numeric;
        missing := missing - abs(lot.lot_quantity) * factor;
        exit when missing <= 0;
    end loop;
end $$;

-- The value of a message of transactions-processed (contract, Output topics).
create function processed_transaction(t transactions, epoch int, sequence int, replayed boolean) returns bytea
    language sql stable
    return convert_to(json_build_object(
        'portfolio_id', t.portfolio_id, 'security_id', t.security_id, 'epoch', epoch, 'sequence', sequence,
        'transaction_id', t.transaction_id,
        'transaction_date', to_char(t.transaction_date at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
        'transaction_type', t.transaction_type, 'quantity', trim_scale(t.quantity), 'price', trim_scale(t.price),
        'gross_transaction_amount', trim_scale(t.gross_transaction_amount), 'trade_fee', trim_scale(t.trade_fee),
        'currency', t.currency, 'revision', t.revision, 'cancelled', t.cancelled, 'replayed', replayed)::text, 'UTF8');

-- replay: this row stands for the replay of a key (security_id, portfolio_id, epoch), sequence `next` to `last`, under
-- event ids that were drawn with it: [first id, count] pairs. held_at: the row waits behind one that cannot be
-- published, or is that one, which has a failure_reason.
alter table outbox_events
    add column replay         jsonb,
    add column held_at        timestamptz,
    add column failure_reason text;
create index outbox_events_waiting on outbox_events (id) where held_at is null;
create index outbox_events_held on outbox_events (topic, message_key, id) where held_at is not null;
create index outbox_events_replays on outbox_events (message_key, id) where replay is not null;
-- A queue: dead rows must go before they slow down the reads of its head.
alter table outbox_events set (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0,
    autovacuum_vacuum_insert_scale_factor = 0.2);

-- What retention has removed of a key's superseded history can no longer be asked for.
create table history_horizons (
    security_id    text collate "C" not null,
    portfolio_id   text collate "C" not null,
    complete_since timestamptz not null,  -- moments before it are gone
    first_epoch    int         not null,  -- epochs before it are gone
    primary key (security_id, portfolio_id)
);

create function check_horizon(portfolio text, security text, known_at timestamptz, epoch int) returns boolean
    language plpgsql stable as $$
declare
    horizon history_horizons;
begin
    select * into horizon from history_horizons h where h.security_id = security and h.portfolio_id = portfolio;
    if known_at < horizon.complete_since then
        raise exception 'what was known of this key before % has been removed by retention', horizon.complete_since
            using errcode = 'no_data_found';
    end if;
    if epoch < horizon.first_epoch then
        raise exception 'epochs of this key before % have been removed by retention', horizon.first_epoch
            using errcode = 'no_data_found';
    end if;
    return true;
end $$;

-- A key's history as it was known at a moment: one consistent version, because all rows of a database transaction
-- carry one time, which grows per key.
create function history_known_at(portfolio text, security text, known_at timestamptz default 'infinity')
    returns setof position_history
    language sql stable
    begin atomic
        select h.* from position_history h
        where h.portfolio_id = portfolio and h.security_id = security and check_horizon(portfolio, security, known_at, null)
          and h.recorded_at <= known_at and (h.superseded_at is null or h.superseded_at > known_at)
        order by h.sequence;
    end;

-- The position at the end of a date, as it was known at a moment; no row where the key had no transaction by then.
create function position_as_of(portfolio text, security text, as_of_date date, known_at timestamptz default 'infinity')
    returns table (portfolio_id text, security_id text, position_date date, transaction_id text, epoch int,
                   sequence int, quantity numeric, cost_basis numeric, realized_gain_loss numeric)
    language sql stable
    begin atomic
        select h.portfolio_id, h.security_id, h.position_date, h.transaction_id, h.epoch, h.sequence,
               h.quantity, h.cost_basis, h.realized_gain_loss
        from position_history h
        where h.portfolio_id = portfolio and h.security_id = security and check_horizon(portfolio, security, known_at, null)
          and h.position_date <= as_of_date
          and h.recorded_at <= known_at and (h.superseded_at is null or h.superseded_at > known_at)
        order by h.position_date desc, h.sequence desc
        limit 1;
    end;

-- A key's history under an epoch: as it stood at the end of that epoch, or stands now.
create function history_of_epoch(portfolio text, security text, wanted int) returns setof position_history
    language sql stable
    begin atomic
        select h.* from position_history h
        where h.portfolio_id = portfolio and h.security_id = security
          and h.epoch <= wanted and (h.superseded_epoch is null or h.superseded_epoch > wanted)
          and check_horizon(portfolio, security, null, wanted)
        order by h.sequence;
    end;

-- What became of a key's history from one epoch to another: the transactions after which position or place in time
-- differ. null on the old side: added; on the new side: removed.
create function correction_difference(portfolio text, security text, old_epoch int, new_epoch int)
    returns table (transaction_id text, change text, old_sequence int, new_sequence int,
                   old_position_date date, new_position_date date, old_quantity numeric, new_quantity numeric,
                   old_cost_basis numeric, new_cost_basis numeric,
                   old_realized_gain_loss numeric, new_realized_gain_loss numeric)
    language sql stable
    begin atomic
        select transaction_id,
               case when o.sequence is null then 'added' when n.sequence is null then 'removed' else 'changed' end,
               o.sequence, n.sequence, o.position_date, n.position_date, o.quantity, n.quantity,
               o.cost_basis, n.cost_basis, o.realized_gain_loss, n.realized_gain_loss
        from history_of_epoch(portfolio, security, old_epoch) o
        full join history_of_epoch(portfolio, security, new_epoch) n using (transaction_id)
        where (o.position_date, o.quantity, o.cost_basis, o.realized_gain_loss)
              is distinct from (n.position_date, n.quantity, n.cost_basis, n.realized_gain_loss)
        order by coalesce(n.sequence, o.sequence), n.sequence nulls first;
    end;
