-- What late prices replaced: every price up to L that a correction (reason 'price') changed. The snapshots keep no values
-- from before a price correction; with these and the quantities held they can be told.
create table corrected_prices (
    seq          bigint  not null,  -- the correction
    price_date   date    not null,
    price_before numeric,           -- null: there was none for this date
    price_after  numeric not null,
    primary key (seq, price_date)
);
