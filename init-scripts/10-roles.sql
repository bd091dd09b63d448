-- One role for each thing that connects, with the least it needs. May be run twice.
--
-- Passwords come from files below /run/secrets, so that they stand neither here nor in a command line.
-- A role whose file is missing is made without a password: it cannot log in over the network, and this
-- script says so.

SET log_statement = 'none';
SET log_min_duration_statement = -1;
SET log_min_error_statement = 'panic';
SET password_encryption = 'scram-sha-256';

SELECT format('CREATE ROLE %I LOGIN', name)
FROM (VALUES ('pgmesh_replication'), ('pgmesh_backup'), ('pgmesh_lag'), ('pgmesh_health')) AS wanted (name)
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name)
\gexec

-- Standbys: stream, and nothing else.
ALTER ROLE pgmesh_replication REPLICATION;

-- The backup agent: base backups (REPLICATION), statistics and settings (pg_monitor), and closing the
-- current WAL segment, so that a backup does not wait for one to fill.
ALTER ROLE pgmesh_backup REPLICATION CONNECTION LIMIT 10;
GRANT pg_monitor TO pgmesh_backup;
GRANT EXECUTE ON FUNCTION pg_catalog.pg_switch_wal() TO pgmesh_backup;

-- The lag exporter: statistics, settings and the names of WAL files (pg_monitor). Each of its processes
-- has two connections to a server at most, the one it keeps and the one it tries now and then. This is
-- enough for two replicas and a "show --direct" beside them; for more replicas add two each.
ALTER ROLE pgmesh_lag CONNECTION LIMIT 6;
GRANT pg_monitor TO pgmesh_lag;

-- The health monitor: the same. Each of its processes has two connections to a server at most, the one it
-- keeps and the one it tries now and then. This is enough for two replicas and a "check" beside them, with
-- two that a cut network left behind; for more replicas add two each.
ALTER ROLE pgmesh_health CONNECTION LIMIT 8;
GRANT pg_monitor TO pgmesh_health;

\set has_password `test -r /run/secrets/pgmesh_replication_password && echo true || echo false`
\if :has_password
    \set password `cat /run/secrets/pgmesh_replication_password`
    ALTER ROLE pgmesh_replication PASSWORD :'password';
\else
    \warn 'pgmesh_replication has no password: /run/secrets/pgmesh_replication_password is missing'
\endif

\set has_password `test -r /run/secrets/pgmesh_backup_password && echo true || echo false`
\if :has_password
    \set password `cat /run/secrets/pgmesh_backup_password`
    ALTER ROLE pgmesh_backup PASSWORD :'password';
\else
    \warn 'pgmesh_backup has no password: /run/secrets/pgmesh_backup_password is missing'
\endif

\set has_password `test -r /run/secrets/pgmesh_lag_password && echo true || echo false`
\if :has_password
    \set password `cat /run/secrets/pgmesh_lag_password`
    ALTER ROLE pgmesh_lag PASSWORD :'password';
\else
    \warn 'pgmesh_lag has no password: /run/secrets/pgmesh_lag_password is missing'
\endif

\set has_password `test -r /run/secrets/pgmesh_health_password && echo true || echo false`
\if :has_password
    \set password `cat /run/secrets/pgmesh_health_password`
    ALTER ROLE pgmesh_health PASSWORD :'password';
\else
    \warn 'pgmesh_health has no password: /run/secrets/pgmesh_health_password is missing'
\endif
\unset password
