-- expand: the program of before neither reads nor writes the column.

-- The price that the last write replaced; null where it replaced none. A write that stores a price must tell the one
-- before, as it was when the row was locked, and only from version 18 on can Postgres return it without a column.
alter table market_prices add column price_before numeric;
