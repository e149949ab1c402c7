-- expand: how tables are kept, not what they hold; workers of before notice nothing.

-- A herd writes each of a security's keys twice (pulled back, which makes the row longer; valued): with more than half of a
-- page free both stay on it, and the table stays smaller than one whose pages were full.
alter table position_state set (fillfactor = 45, autovacuum_vacuum_scale_factor = 0.05);

-- What is done leaves the partial indexes of what is open, and the planner must know soon how much is open.
alter table corrections set (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);
alter table reprocessing_jobs set (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);
alter table position_history set (autovacuum_vacuum_scale_factor = 0.05);
alter table daily_position_snapshots set (autovacuum_vacuum_scale_factor = 0.05);
