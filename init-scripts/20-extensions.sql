-- Extensions, in the database of the applications. May be run twice. One that the image does not have,
-- or that is not in shared_preload_libraries, is left out, and this script says so.
--
-- citus is not here: with Citus Patroni makes it, and nothing else may. ruvector is not here: its index is
-- not WAL-logged (a standby cannot read it, and a crash loses rows), and it may not stand beside vector in
-- one database. In a database of its own: CREATE EXTENSION ruvector, and no index on it.

SET client_min_messages = 'warning';

SELECT format('CREATE EXTENSION IF NOT EXISTS %I', name)
FROM (VALUES ('vector', false), ('pg_stat_statements', true), ('pgaudit', true)) AS wanted (name, preloaded)
WHERE EXISTS (SELECT FROM pg_available_extensions AS it WHERE it.name = wanted.name)
    AND (NOT preloaded OR name = ANY (string_to_array(replace(current_setting('shared_preload_libraries'), ' ', ''), ',')))
\gexec

SELECT coalesce(string_agg(name, ', '), '') AS missing, count(*) > 0 AS is_missing
FROM (VALUES ('vector'), ('pg_stat_statements'), ('pgaudit')) AS wanted (name)
WHERE NOT EXISTS (SELECT FROM pg_extension WHERE extname = name)
\gset
\if :is_missing
    \warn 'left out, for the image or shared_preload_libraries lacks them:' :missing
\endif
