-- expand: quantities have ten decimal places, and a limit; a split states the open lots anew (docs/positions.md).

-- Marks of few rows, null on all others. out_of_range: the transaction would have taken the quantity to 10^30 or beyond,
-- and left the state as it was. joins_lot: the row's lot has no units, its cost belongs to the newest lot opened before.
-- restates_lots: the row is of a split, and lots_after_split has the lots behind its head.
alter table position_history
    add column out_of_range  boolean,
    add column joins_lot     boolean,
    add column restates_lots boolean;
create index position_history_out_of_range on position_history (security_id, portfolio_id, sequence)
    where superseded_epoch is null and out_of_range;

-- Functions that return the table's rows do so with the columns it had: they are made again for those it has now.
create or replace function history_known_at(portfolio text, security text, known_at timestamptz default 'infinity')
    returns setof position_history
    language sql stable
    begin atomic
        select h.* from position_history h
        where h.portfolio_id = portfolio and h.security_id = security and check_horizon(portfolio, security, known_at, null)
          and h.recorded_at <= known_at and (h.superseded_at is null or h.superseded_at > known_at)
        order by h.sequence;
    end;
create or replace function history_of_epoch(portfolio text, security text, wanted int) returns setof position_history
    language sql stable
    begin atomic
        select h.* from position_history h
        where h.portfolio_id = portfolio and h.security_id = security
          and h.epoch <= wanted and (h.superseded_epoch is null or h.superseded_epoch > wanted)
          and check_horizon(portfolio, security, null, wanted)
        order by h.sequence;
    end;

-- The lots behind the head after a live row that is a split; they go with it. sequence: the last row that put something into the lot.
create table lots_after_split (
    security_id    text collate "C" not null,
    portfolio_id   text collate "C" not null,
    split_sequence int     not null,
    epoch          int     not null,  -- of the split's row
    sequence       int     not null,
    quantity       numeric not null,
    cost           numeric not null,
    primary key (security_id, portfolio_id, split_sequence, epoch, sequence)
);

create function forget_lots_after_split() returns trigger
    language plpgsql as $$
begin
    delete from lots_after_split l
    where l.security_id = old.security_id and l.portfolio_id = old.portfolio_id
      and l.split_sequence = old.sequence and l.epoch = old.epoch;
    return null;
end $$;
create trigger superseded_lots_after_split after update of superseded_epoch on position_history
    for each row when (old.restates_lots and new.superseded_epoch is not null)
    execute function forget_lots_after_split();
create trigger deleted_lots_after_split after delete on position_history
    for each row when (old.restates_lots)
    execute function forget_lots_after_split();

-- What workers of the version before have written by other rules: splits that multiplied lots when they were read, and
-- lots without units. Each such history is booked anew from its transactions, by the `books` role or by its next change.
create index position_history_without_units on position_history (security_id, portfolio_id, sequence)
    where superseded_epoch is null and lot_quantity = 0 and joins_lot is null;
create view outdated_histories as
    select security_id, portfolio_id, sequence from position_history
    where superseded_epoch is null and split_ratio is not null
    union all
    select security_id, portfolio_id, sequence from position_history
    where superseded_epoch is null and lot_quantity = 0 and joins_lot is null;

create view out_of_range_transactions as
    select h.portfolio_id, h.security_id, h.position_date, h.transaction_id, t.transaction_type,
           t.quantity as transaction_quantity, h.epoch, h.sequence, h.quantity
    from position_history h join transactions t using (transaction_id)
    where h.superseded_epoch is null and h.out_of_range;

-- The open lots behind the row `after`, as they are at the row `upto`, oldest first, until they make up `needed` units.
-- A lot's cost includes what later rows without units have added. Splits are those of workers of the version before:
-- they multiply the lots before them, and the comparison is then approximate, on the safe side.
create or replace function open_lots(security text, portfolio text, after int, upto int, needed numeric)
    returns table (sequence int, lot_quantity numeric, lot_cost numeric, split_ratio numeric)
    language plpgsql stable as $$
declare
    stated        record;
    split         record;
    lots          refcursor;
    lot           record;
    in_history    boolean   := false;
    last_sequence int;  -- the lot that the loop has in hand
    last_quantity numeric;
    last_cost     numeric;
    places        int[]     := '{}';
    ratios        numeric[] := '{}';
    place         int       := 1;
    factor        numeric   := 1;
    missing       numeric   := needed;
begin
    select l.split_sequence, l.epoch into stated
    from lots_after_split l
    where l.security_id = security and l.portfolio_id = portfolio and l.split_sequence > after
      and l.split_sequence <= upto
    order by l.security_id desc, l.portfolio_id desc, l.split_sequence desc
    limit 1;
    for split in
        select h.sequence, h.split_ratio from position_history h
        where h.security_id = security and h.portfolio_id = portfolio and h.superseded_epoch is null
          and h.split_ratio is not null and h.sequence > greatest(after, stated.split_sequence) and h.sequence <= upto
        order by h.sequence
    loop
        places := places || split.sequence;
        ratios := ratios || split.split_ratio;
        factor := factor * split.split_ratio;
        missing := needed * 1.000000001;
        return query select split.sequence, null::numeric, null::numeric, split.split_ratio;
    end loop;
    -- One after the other, each in the order of its index: a union would be sorted, and read to its end for that.
    open lots for
        select l.sequence, l.quantity, l.cost, false as joins from lots_after_split l
        where l.security_id = security and l.portfolio_id = portfolio and l.split_sequence = stated.split_sequence
          and l.epoch = stated.epoch and l.sequence > after
        order by l.sequence;
    loop
        fetch lots into lot;
        if not found then
            exit when in_history;
            in_history := true;
            close lots;
            open lots for
                select h.sequence, h.lot_quantity as quantity, h.lot_cost as cost, coalesce(h.joins_lot, false) as joins
                from position_history h
                where h.security_id = security and h.portfolio_id = portfolio and h.superseded_epoch is null
                  and h.lot_quantity is not null and h.sequence > greatest(after, stated.split_sequence)
                  and h.sequence <= upto
                order by h.sequence;
            continue;
        end if;
        if lot.joins and last_sequence is not null then
            last_sequence := lot.sequence;
            last_cost := last_cost + lot.cost;
            continue;
        end if;
        if last_sequence is not null then
            return query select last_sequence, last_quantity, last_cost, null::numeric;
        end if;
        last_sequence := null;
        exit when missing <= 0;
        while place <= cardinality(places) and places[place] < lot.sequence loop
            factor := factor / ratios[place];
            place := place + 1;
        end loop;
        missing := missing - abs(lot.quantity) * factor;
        last_sequence := lot.sequence;
        last_quantity := lot.quantity;
        last_cost := lot.cost;
    end loop;
    close lots;
    if last_sequence is not null then
        return query select last_sequence, last_quantity, last_cost, null::numeric;
    end if;
end $$;
