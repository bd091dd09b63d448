-- One role for each thing that connects, with the least it needs. May be run twice.
--
-- Passwords come from files below /run/secrets, so that they stand neither here nor in a command line.
-- A role whose file is missing is made without a password: it cannot log in over the network, and this
-- script says so.

SET log_statement = 'none';
SET log_min_duration_statement = -1;
SET log_min_error_statement = 'panic';
SET pgaudit.log = 'none';
SET pg_stat_statements.track_utility = off;
SET password_encryption = 'scram-sha-256';

SELECT format('CREATE ROLE %I LOGIN', name)
FROM (VALUES ('pgmesh_replication'), ('pgmesh_backup'), ('pgmesh_lag'), ('pgmesh_health'), ('pgmesh_rebalance')) AS wanted (name)
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
-- keeps and the one it tries now and then. This is enough for three replicas and a "check" beside them, with
-- two that a cut network left behind; for more replicas add two each.
ALTER ROLE pgmesh_health CONNECTION LIMIT 10;
GRANT pg_monitor TO pgmesh_health;

-- The rebalance agent: the same, to look. To move a shard it needs the rights of the owner of its tables:
-- Citus asks for no less, and for no more. Those of superusers it does not get: such tables stay. Run this
-- again when tables have a new owner, or stand in a new schema: Citus tells no size on a node that has a
-- shard of one that the role may not use. Citus uses the role between the nodes too, hence so many connections.
-- Tasks of Citus' background jobs run with the role's own settings: writers wait behind their locks.
ALTER ROLE pgmesh_rebalance CONNECTION LIMIT 40;
ALTER ROLE pgmesh_rebalance SET lock_timeout = '1s';
GRANT pg_monitor TO pgmesh_rebalance;
SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus') AS has_citus
\gset
\if :has_citus
    SELECT DISTINCT format('GRANT %I TO pgmesh_rebalance', rolname)
    FROM pg_catalog.pg_dist_partition
    JOIN pg_class ON pg_class.oid = logicalrelid
    JOIN pg_roles ON pg_roles.oid = relowner
    WHERE NOT rolsuper AND rolname <> 'pgmesh_rebalance'
    \gexec
    SELECT DISTINCT format('GRANT USAGE ON SCHEMA %s TO pgmesh_rebalance', relnamespace::regnamespace)
    FROM pg_catalog.pg_dist_partition
    JOIN pg_class ON pg_class.oid = logicalrelid
    WHERE NOT has_schema_privilege('pgmesh_rebalance', relnamespace, 'USAGE')
    \gexec
    -- A node that is new lacks the reference tables, and a move brings none along.
    GRANT EXECUTE ON FUNCTION pg_catalog.replicate_reference_tables TO pgmesh_rebalance;
\else
    \warn 'pgmesh_rebalance may look, and move nothing: this database has no Citus'
\endif

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

\set has_password `test -r /run/secrets/pgmesh_rebalance_password && echo true || echo false`
\if :has_password
    \set password `cat /run/secrets/pgmesh_rebalance_password`
    ALTER ROLE pgmesh_rebalance PASSWORD :'password';
\else
    \warn 'pgmesh_rebalance has no password: /run/secrets/pgmesh_rebalance_password is missing'
\endif

-- Those that Patroni makes, with the password of that day: a rotated one, and one from before a restore.
\set has_password `test -r /run/secrets/postgres_password && echo true || echo false`
\if :has_password
    \set password `cat /run/secrets/postgres_password`
    ALTER ROLE postgres PASSWORD :'password';
\endif
\set has_password `test -r /run/secrets/pgmesh_rewind_password && echo true || echo false`
SELECT :'has_password' = 'true' AND EXISTS (SELECT FROM pg_roles WHERE rolname = 'pgmesh_rewind') AS has_password
\gset
\if :has_password
    \set password `cat /run/secrets/pgmesh_rewind_password`
    ALTER ROLE pgmesh_rewind PASSWORD :'password';
\endif
\unset password
