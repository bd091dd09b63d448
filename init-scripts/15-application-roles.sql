-- The roles of people and applications, in the database that they use. May be run twice.
--
--   pgmesh_owner      owns the tables. Citus asks that an owner may log in; it has no password, so nobody can. With
--                     Citus its nodes can: 25-citus-logins.sql
--   pgmesh_admin      people: makes tables and roles, sees and ends sessions. No superuser: that one is
--                     inside the database containers only. Not through PgBouncer
--   pgmesh_app        applications: reads and writes all rows
--   pgmesh_readonly   reads
--   pgmesh_mcp        AI agents: reads, and adds rows to the tables that 30-tables.sql says; changes none
--   pgmesh_pgbouncer  PgBouncer, to look up the password that a client must know; nothing else
--
-- Passwords come from files below /run/secrets as those of 10-roles.sql do.

SET client_min_messages = 'warning';
SET log_statement = 'none';
SET log_min_duration_statement = -1;
SET log_min_error_statement = 'panic';
SET pgaudit.log = 'none';
SET pg_stat_statements.track_utility = off;
SET password_encryption = 'scram-sha-256';

SELECT format('CREATE ROLE %I LOGIN', name)
FROM (VALUES ('pgmesh_owner'), ('pgmesh_admin'), ('pgmesh_app'), ('pgmesh_readonly'), ('pgmesh_mcp'), ('pgmesh_pgbouncer')) AS wanted (name)
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name)
\gexec

-- Not pg_read_all_data: that reads everybody's password in pg_authid too.
ALTER ROLE pgmesh_admin CREATEROLE CREATEDB;
GRANT pgmesh_owner, pg_monitor, pg_signal_backend, pg_checkpoint TO pgmesh_admin;
SELECT 'GRANT pg_maintain TO pgmesh_admin' FROM pg_roles WHERE rolname = 'pg_maintain'
\gexec
ALTER ROLE pgmesh_readonly SET default_transaction_read_only = on;
ALTER ROLE pgmesh_mcp CONNECTION LIMIT 50;
ALTER ROLE pgmesh_mcp SET statement_timeout = '30s';
ALTER ROLE pgmesh_mcp SET idle_in_transaction_session_timeout = '30s';
ALTER ROLE pgmesh_pgbouncer CONNECTION LIMIT 8;

-- Who is not named may not even connect: not here, and not to the databases that each server has. Agents ask in
-- postgres, and pg_rewind. Citus' nodes do this each for itself.
SET citus.enable_ddl_propagation = off;
SELECT format('GRANT CONNECT ON DATABASE postgres TO %I', rolname)
FROM pg_roles WHERE rolname IN ('pgmesh_admin', 'pgmesh_backup', 'pgmesh_lag', 'pgmesh_health', 'pgmesh_rewind')
\gexec
REVOKE ALL ON DATABASE postgres, template1 FROM PUBLIC;
RESET citus.enable_ddl_propagation;
SELECT format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database())
\gexec
SELECT format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), rolname)
FROM pg_roles WHERE rolname IN ('pgmesh_admin', 'pgmesh_app', 'pgmesh_readonly', 'pgmesh_mcp', 'pgmesh_pgbouncer',
    'pgmesh_backup', 'pgmesh_lag', 'pgmesh_health', 'pgmesh_rebalance')
\gexec
SELECT format('GRANT CREATE, TEMPORARY ON DATABASE %I TO pgmesh_owner', current_database())
\gexec
SELECT format('GRANT TEMPORARY ON DATABASE %I TO pgmesh_app, pgmesh_readonly', current_database())
\gexec
GRANT CREATE, USAGE ON SCHEMA public TO pgmesh_owner;
GRANT USAGE ON SCHEMA public TO pgmesh_app, pgmesh_readonly, pgmesh_mcp;

-- What the owner makes later is given out as it is made.
ALTER DEFAULT PRIVILEGES FOR ROLE pgmesh_owner IN SCHEMA public GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO pgmesh_app;
ALTER DEFAULT PRIVILEGES FOR ROLE pgmesh_owner IN SCHEMA public GRANT USAGE, SELECT ON SEQUENCES TO pgmesh_app;
ALTER DEFAULT PRIVILEGES FOR ROLE pgmesh_owner IN SCHEMA public GRANT SELECT ON TABLES TO pgmesh_readonly, pgmesh_mcp;

-- PgBouncer asks this with auth_query. It tells nothing of roles that may do more than use tables: superusers, those
-- that make roles, copy the server or pass by row security, those that watch it, as agents and pgmesh_admin do, and
-- some of our own.
CREATE SCHEMA IF NOT EXISTS pgmesh;
CREATE OR REPLACE FUNCTION pgmesh.pgbouncer_lookup(wanted text, OUT name text, OUT password text)
RETURNS SETOF record LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT rolname::text, rolpassword
    FROM pg_authid
    WHERE rolname = wanted AND rolcanlogin AND NOT rolsuper AND NOT rolreplication AND NOT rolcreaterole AND NOT rolbypassrls
        AND NOT pg_has_role(oid, 'pg_monitor', 'MEMBER') AND rolname NOT IN ('pgmesh_owner', 'pgmesh_rewind', 'pgmesh_pgbouncer')
        AND (rolvaliduntil IS NULL OR rolvaliduntil > now())
$$;
REVOKE ALL ON FUNCTION pgmesh.pgbouncer_lookup(text) FROM PUBLIC;
GRANT USAGE ON SCHEMA pgmesh TO pgmesh_pgbouncer;
GRANT EXECUTE ON FUNCTION pgmesh.pgbouncer_lookup(text) TO pgmesh_pgbouncer;

\set has_password `test -r /run/secrets/pgmesh_admin_password && echo true || echo false`
\if :has_password
    \set password `cat /run/secrets/pgmesh_admin_password`
    ALTER ROLE pgmesh_admin PASSWORD :'password';
\else
    \warn 'pgmesh_admin has no password: /run/secrets/pgmesh_admin_password is missing'
\endif

\set has_password `test -r /run/secrets/pgmesh_app_password && echo true || echo false`
\if :has_password
    \set password `cat /run/secrets/pgmesh_app_password`
    ALTER ROLE pgmesh_app PASSWORD :'password';
\else
    \warn 'pgmesh_app has no password: /run/secrets/pgmesh_app_password is missing'
\endif

\set has_password `test -r /run/secrets/pgmesh_readonly_password && echo true || echo false`
\if :has_password
    \set password `cat /run/secrets/pgmesh_readonly_password`
    ALTER ROLE pgmesh_readonly PASSWORD :'password';
\else
    \warn 'pgmesh_readonly has no password: /run/secrets/pgmesh_readonly_password is missing'
\endif

\set has_password `test -r /run/secrets/pgmesh_mcp_password && echo true || echo false`
\if :has_password
    \set password `cat /run/secrets/pgmesh_mcp_password`
    ALTER ROLE pgmesh_mcp PASSWORD :'password';
\else
    \warn 'pgmesh_mcp has no password: /run/secrets/pgmesh_mcp_password is missing'
\endif

\set has_password `test -r /run/secrets/pgmesh_pgbouncer_password && echo true || echo false`
\if :has_password
    \set password `cat /run/secrets/pgmesh_pgbouncer_password`
    ALTER ROLE pgmesh_pgbouncer PASSWORD :'password';
\else
    \warn 'pgmesh_pgbouncer has no password: /run/secrets/pgmesh_pgbouncer_password is missing'
\endif
\unset password
