-- expand: workers of the version before read the rate and change it only within their settings.
-- One range for the reset rate, the same as in sinks/ranges.py. Outside of it resets stood still (1e-300), or the
-- arithmetic of the limiter left the range of an interval (1e308) and the loop died.
update reset_limit set
    rows_per_second = least(greatest(rows_per_second, 1), 1e9),  -- not a number counts as the highest
    adapted_rows_per_second = null,
    tat = least(tat, clock_timestamp());

alter table reset_limit add constraint reset_limit_rate_in_range check (rows_per_second between 1 and 1e9);
