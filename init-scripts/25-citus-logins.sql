-- With Citus: how its nodes log in with each other as the roles of clients. They ask each other for a password,
-- as everybody is asked, and find it in pg_dist_authinfo of their own, which superusers alone can read. May be run
-- twice; runs on every node, for a node that joins just then may miss what the coordinator grants. Without Citus
-- nothing is done.
--
-- pgmesh_owner too logs in between nodes, when tables are distributed and shards are moved. Its password follows
-- from the superuser's, which nobody but the nodes has: so nobody else knows it.

SET client_min_messages = 'warning';
SET log_statement = 'none';
SET log_min_duration_statement = -1;
SET log_min_error_statement = 'panic';
SET pgaudit.log = 'none';
SET pg_stat_statements.track_utility = off;
SET password_encryption = 'scram-sha-256';

SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus') AS has_citus
\gset
\if :has_citus
\else
    \q
\endif

\set password `cat /run/secrets/postgres_password`
SELECT encode(sha256(convert_to('pgmesh_owner ' || :'password', 'UTF8')), 'hex') AS password
\gset
ALTER ROLE pgmesh_owner PASSWORD :'password';
SELECT format('GRANT CONNECT ON DATABASE %I TO pgmesh_owner', current_database())
\gexec

-- To move a shard the rebalance agent needs the rights of its owner, on each node.
GRANT pgmesh_owner TO pgmesh_rebalance;

-- The server reads the files where psql did: both are in its container.
INSERT INTO pg_catalog.pg_dist_authinfo (nodeid, rolename, authinfo)
SELECT 0, rolname, format('password=''%s''', replace(replace(value, '\', '\\'), '''', '\'''))
FROM (SELECT rolname, CASE rolname WHEN 'pgmesh_owner' THEN :'password'
        ELSE rtrim(pg_read_file(format('/run/secrets/%s_password', rolname), true), E'\n') END AS value
    FROM pg_roles WHERE rolname IN ('pgmesh_owner', 'pgmesh_rebalance', 'pgmesh_admin', 'pgmesh_app', 'pgmesh_readonly', 'pgmesh_mcp')) AS logins
WHERE value IS NOT NULL
ON CONFLICT (rolename, nodeid) DO UPDATE SET authinfo = excluded.authinfo
WHERE pg_dist_authinfo.authinfo <> excluded.authinfo;
\unset password
