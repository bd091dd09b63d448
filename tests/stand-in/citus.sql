-- A STAND-IN for Citus' catalogue: this is not Citus, and nothing in it is distributed or moves.
--
-- It gives a plain PostgreSQL 17 the relations, views and functions of Citus 14 that the rebalance agent
-- reads and calls, with the names, columns, types and errors that were recorded of a real one, so that it
-- can be tried where there is no Citus. What they answer stands in the tables of the schema stand_in, for a
-- test to change; a move changes the catalogue, and no data. Run it on each server, with the number of its
-- group: psql -v group=1.

SET allow_system_table_mods = on;
SET client_min_messages = warning;

INSERT INTO pg_extension (oid, extname, extowner, extnamespace, extrelocatable, extversion)
VALUES (999001, 'citus', 10, 11, false, '14.0-1');

CREATE TYPE pg_catalog.noderole AS ENUM ('primary', 'secondary', 'unavailable');
CREATE TYPE pg_catalog.citus_job_status AS ENUM
    ('scheduled', 'running', 'finished', 'cancelling', 'cancelled', 'failing', 'failed');
CREATE SCHEMA citus;
CREATE TYPE citus.shard_transfer_mode AS ENUM ('auto', 'force_logical', 'block_writes');
CREATE TYPE pg_catalog.citus_task_status AS ENUM
    ('blocked', 'runnable', 'running', 'done', 'cancelling', 'error', 'unscheduled', 'cancelled');

CREATE TABLE pg_catalog.pg_dist_node (
    nodeid int PRIMARY KEY, groupid int NOT NULL, nodename text NOT NULL, nodeport int NOT NULL DEFAULT 5432,
    noderack text NOT NULL DEFAULT 'default', hasmetadata bool NOT NULL DEFAULT true,
    isactive bool NOT NULL DEFAULT true, noderole noderole NOT NULL DEFAULT 'primary',
    nodecluster name NOT NULL DEFAULT 'default', metadatasynced bool DEFAULT true,
    shouldhaveshards bool NOT NULL DEFAULT true, nodeisclone bool NOT NULL DEFAULT false,
    nodeprimarynodeid int NOT NULL DEFAULT 0, UNIQUE (nodename, nodeport));
CREATE TABLE pg_catalog.pg_dist_placement (
    placementid bigserial PRIMARY KEY, shardid bigint NOT NULL, shardstate int NOT NULL DEFAULT 1,
    shardlength bigint NOT NULL DEFAULT 0, groupid int NOT NULL);
CREATE TABLE pg_catalog.pg_dist_shard (
    logicalrelid regclass NOT NULL, shardid bigint PRIMARY KEY, shardstorage "char" NOT NULL DEFAULT 't',
    shardminvalue text, shardmaxvalue text);
CREATE TABLE pg_catalog.pg_dist_partition (
    logicalrelid regclass PRIMARY KEY, partmethod "char" NOT NULL, partkey text, colocationid int NOT NULL DEFAULT 0,
    repmodel "char" NOT NULL DEFAULT 's', autoconverted bool DEFAULT false);
CREATE TABLE pg_catalog.pg_dist_background_job (
    job_id bigserial PRIMARY KEY, state citus_job_status NOT NULL DEFAULT 'scheduled', job_type name NOT NULL,
    description text NOT NULL, started_at timestamptz, finished_at timestamptz);
CREATE TABLE pg_catalog.pg_dist_background_task (
    job_id bigint NOT NULL, task_id bigserial PRIMARY KEY, owner regrole NOT NULL DEFAULT current_user::regrole,
    pid int, status citus_task_status NOT NULL DEFAULT 'runnable', command text NOT NULL, retry_count int,
    not_before timestamptz, message text NOT NULL DEFAULT '', nodes_involved int[]);
CREATE TABLE pg_catalog.pg_dist_cleanup (
    record_id bigserial PRIMARY KEY, operation_id bigint NOT NULL, object_type int NOT NULL, object_name text NOT NULL,
    node_group_id int NOT NULL, policy_type int NOT NULL);
CREATE FUNCTION pg_catalog.citus_shard_allowed_on_node_true(bigint, int) RETURNS bool LANGUAGE sql AS 'SELECT true';
CREATE TABLE pg_catalog.pg_dist_rebalance_strategy (
    name name NOT NULL UNIQUE, default_strategy bool NOT NULL DEFAULT false,
    shard_allowed_on_node_function regproc NOT NULL);
INSERT INTO pg_dist_rebalance_strategy VALUES
    ('by_shard_count', false, 'citus_shard_allowed_on_node_true'),
    ('by_disk_size', true, 'citus_shard_allowed_on_node_true');
CREATE TABLE pg_catalog.pg_dist_local_group (groupid int NOT NULL PRIMARY KEY);
INSERT INTO pg_dist_local_group VALUES (:group);
GRANT SELECT ON pg_dist_node, pg_dist_placement, pg_dist_shard, pg_dist_partition, pg_dist_background_job,
    pg_dist_background_task, pg_dist_cleanup, pg_dist_local_group, pg_dist_rebalance_strategy TO PUBLIC;

-- What a table of a shard is called; a real one shortens long names.
CREATE FUNCTION pg_catalog.shard_name(object_name regclass, shard_id bigint, skip_qualify_public bool = true)
    RETURNS text LANGUAGE sql STABLE STRICT AS $$
    SELECT CASE WHEN nspname = 'public' AND skip_qualify_public THEN '' ELSE quote_ident(nspname) || '.' END
           || quote_ident(relname || '_' || shard_id)
      FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = object_name
$$;

-- What the functions answer. A function that is named in failure fails with that message.
CREATE SCHEMA stand_in;
CREATE TABLE stand_in.failure (function text PRIMARY KEY, message text NOT NULL);
CREATE TABLE stand_in.size (shardid bigint PRIMARY KEY, bytes bigint);
CREATE TABLE stand_in.disk (available bigint NOT NULL, total bigint NOT NULL);
INSERT INTO stand_in.disk VALUES (60::bigint << 30, 100::bigint << 30);
CREATE TABLE stand_in.broken_link (from_node int, to_node int, result bool);
CREATE TABLE stand_in.plan (shardid bigint, source int, target int);
CREATE TABLE stand_in.building (nodeid int);
GRANT USAGE ON SCHEMA stand_in TO PUBLIC;
GRANT SELECT ON stand_in.building TO PUBLIC;
CREATE TABLE stand_in.progress (shardid bigint, source int, target int, progress bigint, status text);
CREATE SEQUENCE stand_in.shardid START 102008;
-- How long a move copies. At its end it needs the lock on the other table, as a real one that of the shard,
-- and keeps it for so long.
-- Before that it builds an index for so long, and meanwhile its progress answers nobody, as a real one whose
-- target has a table locked. One that is stubborn does not end when it is cancelled, as if a node did not answer.
CREATE TABLE stand_in.copying (
    seconds float NOT NULL, locked_seconds float NOT NULL DEFAULT 0, indexing_seconds float NOT NULL DEFAULT 0,
    is_stubborn bool NOT NULL DEFAULT false);
INSERT INTO stand_in.copying VALUES (0.2);
CREATE TABLE stand_in.cutover ();
CREATE TABLE stand_in.constraints ();
CREATE TABLE stand_in.indexing ();

CREATE FUNCTION stand_in.may_fail(name text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE reason text := (SELECT message FROM stand_in.failure WHERE function = name);
BEGIN
    IF reason IS NOT NULL THEN RAISE EXCEPTION '%', reason; END IF;
END $$;

CREATE FUNCTION pg_catalog.citus_is_coordinator() RETURNS bool LANGUAGE sql
    AS 'SELECT EXISTS (SELECT FROM pg_catalog.pg_dist_local_group WHERE groupid = 0)';

CREATE FUNCTION pg_catalog.citus_local_disk_space_stats(OUT available_disk_size bigint, OUT total_disk_size bigint)
    LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM stand_in.may_fail('citus_local_disk_space_stats');
    SELECT available, total INTO available_disk_size, total_disk_size FROM stand_in.disk;
END $$;

CREATE FUNCTION pg_catalog.citus_shard_sizes(OUT shard_id int, OUT size bigint) RETURNS SETOF record
    LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM stand_in.may_fail('citus_shard_sizes');
    RETURN QUERY SELECT shardid::int, bytes FROM stand_in.size;
END $$;

CREATE VIEW pg_catalog.citus_shards AS
SELECT shard.logicalrelid AS table_name, shard.shardid, shard.logicalrelid::text || '_' || shard.shardid AS shard_name,
       CASE WHEN table_.repmodel = 't' THEN 'reference' ELSE 'distributed' END AS citus_table_type,
       table_.colocationid AS colocation_id, node.nodename, node.nodeport, sizes.size AS shard_size
  FROM pg_dist_shard AS shard
  JOIN pg_dist_placement AS placement ON placement.shardid = shard.shardid
  JOIN pg_dist_node AS node ON node.groupid = placement.groupid
  JOIN pg_dist_partition AS table_ ON table_.logicalrelid = shard.logicalrelid
  LEFT JOIN citus_shard_sizes() AS sizes ON sizes.shard_id = shard.shardid
 WHERE placement.shardstate = 1;
GRANT SELECT ON pg_catalog.citus_shards TO PUBLIC;

CREATE FUNCTION pg_catalog.citus_check_cluster_node_health(
    OUT from_nodename text, OUT from_nodeport int, OUT to_nodename text, OUT to_nodeport int, OUT result bool)
    RETURNS SETOF record LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM stand_in.may_fail('citus_check_cluster_node_health');
    RETURN QUERY SELECT a.nodename, a.nodeport, b.nodename, b.nodeport,
           CASE WHEN link.from_node IS NULL THEN true ELSE link.result END
      FROM pg_dist_node AS a CROSS JOIN pg_dist_node AS b
      LEFT JOIN stand_in.broken_link AS link ON link.from_node = a.nodeid AND link.to_node = b.nodeid
     WHERE a.noderole = 'primary' AND b.noderole = 'primary';
END $$;

-- Asks this server in place of each, and believes what it says of all but those that are listed: they do
-- what is asked for. As in a session of its own, the lock_timeout is that of the role.
CREATE FUNCTION pg_catalog.run_command_on_all_nodes(
    command text, parallel bool = true, give_warning_for_connection_errors bool = false,
    OUT nodeid int, OUT success bool, OUT result text) RETURNS SETOF record LANGUAGE plpgsql
    SET lock_timeout = 0 AS $$
#variable_conflict use_column
DECLARE
    answer text;
    own text := (SELECT substr(it, length('lock_timeout=') + 1) FROM pg_roles, unnest(rolconfig) AS it
                  WHERE rolname = current_user AND it LIKE 'lock\_timeout=%');
BEGIN
    PERFORM set_config('lock_timeout', coalesce(own, '0'), true);
    -- As it goes over the wire: t, not true.
    EXECUTE format('SELECT format(''%%s'', answer) FROM (%s) AS asked (answer)', command) INTO answer;
    RETURN QUERY SELECT node.nodeid, true,
           CASE WHEN EXISTS (SELECT FROM stand_in.building AS it WHERE it.nodeid = node.nodeid) THEN 't' ELSE answer END
      FROM pg_dist_node AS node WHERE noderole = 'primary';
END $$;

CREATE FUNCTION pg_catalog.get_rebalance_table_shards_plan(
    relation regclass = NULL, threshold real = NULL, max_shard_moves int = 1000000, excluded_shard_list bigint[] = '{}',
    drain_only bool = false, rebalance_strategy name = NULL, improvement_threshold real = NULL)
    RETURNS TABLE (table_name regclass, shardid bigint, shard_size bigint, sourcename text, sourceport int,
                   targetname text, targetport int)
    LANGUAGE plpgsql SECURITY DEFINER AS $$
#variable_conflict use_column
BEGIN
    PERFORM stand_in.may_fail('get_rebalance_table_shards_plan');
    -- shard_size is 0 in the real one too.
    RETURN QUERY SELECT shard.logicalrelid, plan.shardid, 0::bigint, a.nodename, a.nodeport, b.nodename, b.nodeport
      FROM stand_in.plan AS plan
      JOIN pg_dist_shard AS shard ON shard.shardid = plan.shardid
      JOIN pg_dist_node AS a ON a.nodeid = plan.source
      JOIN pg_dist_node AS b ON b.nodeid = plan.target
      -- What is there is planned no more.
      JOIN pg_dist_placement AS placement ON placement.shardid = plan.shardid AND placement.groupid = a.groupid;
END $$;

CREATE FUNCTION pg_catalog.get_rebalance_progress()
    RETURNS TABLE (sessionid int, table_name regclass, shardid bigint, shard_size bigint, sourcename text, sourceport int,
                   targetname text, targetport int, progress bigint, source_shard_size bigint, target_shard_size bigint,
                   operation_type text, source_lsn pg_lsn, target_lsn pg_lsn, status text)
    LANGUAGE plpgsql SECURITY DEFINER AS $$
#variable_conflict use_column
BEGIN
    PERFORM stand_in.may_fail('get_rebalance_progress');
    PERFORM FROM stand_in.indexing;
    -- A real one has a daemon that drops what moves left, after citus.defer_shard_delete_interval.
    DELETE FROM pg_dist_cleanup
     WHERE policy_type = 2 AND operation_id BETWEEN 1000000 AND extract(epoch FROM clock_timestamp()) - 2;
    RETURN QUERY SELECT it.pid, shard.logicalrelid, it.shardid, 0::bigint, a.nodename, a.nodeport, b.nodename,
           b.nodeport, it.progress, 0::bigint, it.bytes, 'move', NULL::pg_lsn, NULL::pg_lsn, it.status
      FROM (SELECT *, 1 AS pid, 0::bigint AS bytes FROM stand_in.progress
            UNION ALL
            SELECT placement.shardid, source.nodeid, source.nodeid, 1,
                   CASE WHEN EXISTS (SELECT FROM pg_locks AS lock
                                      WHERE lock.pid = pg_locks.pid AND lock.relation = 'stand_in.cutover'::regclass)
                        THEN 'Final Catchup'
                        WHEN EXISTS (SELECT FROM pg_locks AS lock
                                      WHERE lock.pid = pg_locks.pid AND lock.relation = 'stand_in.constraints'::regclass)
                        THEN 'Creating Constraints' ELSE 'Copying Data' END,
                   pg_locks.pid,
                   coalesce((SELECT bytes FROM stand_in.size WHERE size.shardid = placement.shardid), 0)
              FROM pg_locks
              JOIN pg_dist_placement AS placement ON placement.shardid = pg_locks.objid::bigint
              JOIN pg_dist_node AS source ON source.groupid = placement.groupid AND source.noderole = 'primary'
             WHERE locktype = 'advisory' AND classid::int8 = (hashtext('move')::int8 & 4294967295) AND granted) AS it
      JOIN pg_dist_shard AS shard ON shard.shardid = it.shardid
      JOIN pg_dist_node AS a ON a.nodeid = it.source
      JOIN pg_dist_node AS b ON b.nodeid = it.target;
END $$;

-- It shows as under way while it holds an advisory lock on the shard. What it leaves to be dropped is a
-- record, as of a real one.
CREATE FUNCTION pg_catalog.citus_move_shard_placement(
    shard_id bigint, source_node_id int, target_node_id int, transfer_mode citus.shard_transfer_mode = 'auto')
    RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    source int := (SELECT groupid FROM pg_dist_node WHERE nodeid = source_node_id);
    target int := (SELECT groupid FROM pg_dist_node WHERE nodeid = target_node_id);
    moved record;
    how stand_in.copying := (SELECT it FROM stand_in.copying AS it);
BEGIN
    EXECUTE format('LOCK TABLE %s IN SHARE UPDATE EXCLUSIVE MODE',
                   (SELECT logicalrelid FROM pg_dist_shard WHERE shardid = shard_id));
    PERFORM pg_advisory_xact_lock(hashtext('move'), shard_id::int);
    IF how.is_stubborn THEN
        BEGIN
            PERFORM pg_sleep(how.seconds);
        EXCEPTION WHEN query_canceled THEN
            PERFORM pg_sleep(how.seconds);
        END;
    ELSE
        PERFORM pg_sleep(how.seconds);
    END IF;
    PERFORM stand_in.may_fail('citus_move_shard_placement');
    IF 0 < how.indexing_seconds THEN
        LOCK TABLE stand_in.constraints IN SHARE MODE;
        PERFORM pg_sleep(1);
        LOCK TABLE stand_in.indexing IN ACCESS EXCLUSIVE MODE;
        PERFORM pg_sleep(how.indexing_seconds);
    END IF;
    LOCK TABLE stand_in.cutover IN ACCESS EXCLUSIVE MODE;
    PERFORM pg_sleep(how.locked_seconds);
    FOR moved IN
        SELECT other.shardid, other.logicalrelid
          FROM pg_dist_shard AS first
          JOIN pg_dist_partition AS first_table ON first_table.logicalrelid = first.logicalrelid
          JOIN pg_dist_partition AS other_table ON other_table.colocationid = first_table.colocationid
          JOIN pg_dist_shard AS other
            ON other.logicalrelid = other_table.logicalrelid AND other.shardminvalue = first.shardminvalue
         WHERE first.shardid = shard_id
    LOOP
        UPDATE pg_dist_placement SET groupid = target WHERE shardid = moved.shardid AND groupid = source;
        IF NOT FOUND THEN
            RAISE EXCEPTION 'could not find placement matching "%"', source USING ERRCODE = '22000';
        END IF;
        INSERT INTO pg_dist_cleanup (operation_id, object_type, object_name, node_group_id, policy_type)
        VALUES (extract(epoch FROM clock_timestamp()), 1, moved.logicalrelid::text || '_' || moved.shardid, source, 2);
    END LOOP;
END $$;

-- Begins a job: a task for each shard group that the plan names, the first shard of it, one after the other.
CREATE FUNCTION pg_catalog.citus_rebalance_start(
    rebalance_strategy name = NULL, drain_only bool = false, shard_transfer_mode citus.shard_transfer_mode = 'auto',
    parallel_transfer_reference_tables bool = false, parallel_transfer_colocated_shards bool = false)
    RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    running bigint := (SELECT job_id FROM pg_dist_background_job
                        WHERE job_type = 'rebalance' AND state NOT IN ('finished', 'cancelled', 'failed'));
    job bigint;
BEGIN
    PERFORM stand_in.may_fail('citus_rebalance_start');
    IF running IS NOT NULL THEN
        RAISE EXCEPTION 'A rebalance is already running as job %', running;
    END IF;
    IF NOT EXISTS (SELECT FROM get_rebalance_table_shards_plan()) THEN
        RAISE NOTICE 'No moves available for rebalancing';
        RETURN NULL;
    END IF;
    INSERT INTO pg_dist_background_job (job_type, description) VALUES ('rebalance', 'Rebalance all colocation groups')
    RETURNING job_id INTO job;
    INSERT INTO pg_dist_background_task (job_id, owner, pid, status, command, not_before, nodes_involved)
    SELECT job, session_user::regrole, 0, CASE WHEN row_number() OVER (ORDER BY first) = 1 THEN 'runnable' ELSE 'blocked' END
               ::citus_task_status,
           format('SELECT pg_catalog.citus_move_shard_placement(%s,%s,%s,%L)', first, source, target, shard_transfer_mode),
           '2000-01-01 00:00:00+00', ARRAY[source, target]
      FROM (SELECT min(shardid) AS first, source, target
              FROM stand_in.plan JOIN pg_dist_shard USING (shardid) JOIN pg_dist_partition USING (logicalrelid)
             WHERE shardid IN (SELECT shardid FROM get_rebalance_table_shards_plan())
             GROUP BY colocationid, shardminvalue, source, target) AS planned
     ORDER BY first;
    RETURN job;
END $$;

CREATE FUNCTION pg_catalog.citus_job_cancel(jobid bigint) RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM stand_in.may_fail('citus_job_cancel');
    PERFORM pg_cancel_backend(pid) FROM pg_dist_background_task WHERE job_id = jobid AND status = 'running';
    UPDATE pg_dist_background_task
       SET status = CASE WHEN status = 'running' THEN 'cancelling' ELSE 'cancelled' END::citus_task_status
     WHERE job_id = jobid AND status NOT IN ('done', 'error', 'unscheduled', 'cancelled');
    PERFORM stand_in.update_job(jobid);
END $$;

-- The state of a job follows from those of its tasks.
CREATE FUNCTION stand_in.update_job(job bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE all_of text[] := (SELECT array_agg(status::text) FROM pg_dist_background_task WHERE job_id = job);
BEGIN
    UPDATE pg_dist_background_job SET started_at = coalesce(started_at, clock_timestamp()), state = CASE
        WHEN 'cancelling' = ANY (all_of) THEN 'cancelling' WHEN 'cancelled' = ANY (all_of) THEN 'cancelled'
        WHEN all_of <@ '{done}' THEN 'finished' WHEN all_of <@ '{done,error,unscheduled}' THEN 'failed'
        WHEN all_of && '{error,unscheduled}' THEN 'failing' ELSE 'running' END::citus_job_status
     WHERE job_id = job;
    UPDATE pg_dist_background_job SET finished_at = clock_timestamp()
     WHERE job_id = job AND state IN ('finished', 'cancelled', 'failed');
END $$;

-- A real one has a background worker for it: here somebody CALLs it, as the role that owns the task. It carries
-- out one task at a time, for ever, and tries again what failed, after 1 s where a real one waits for 5 s and 20 s.
CREATE PROCEDURE stand_in.work() LANGUAGE plpgsql AS $$
DECLARE
    next record;
    ended text;
    said text;
BEGIN
    LOOP
        SELECT * INTO next FROM pg_dist_background_task
         WHERE status = 'runnable' AND coalesce(not_before, '-infinity') <= clock_timestamp() ORDER BY task_id LIMIT 1;
        IF NOT FOUND THEN
            PERFORM pg_sleep(0.1);
            COMMIT;
            CONTINUE;
        END IF;
        PERFORM stand_in.set_task(next.task_id, 'running', pg_backend_pid(), '');
        COMMIT;
        BEGIN
            EXECUTE next.command;
            ended := 'done';
            said := 'SELECT 1';
        EXCEPTION WHEN query_canceled OR OTHERS THEN
            ended := 'runnable';
            said := 'ERROR: ' || sqlerrm;
        END;
        COMMIT;
        PERFORM stand_in.set_task(next.task_id, ended, NULL, said);
        COMMIT;
    END LOOP;
END $$;

CREATE FUNCTION stand_in.set_task(task bigint, state text, process int, said text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE was pg_dist_background_task := (SELECT it FROM pg_dist_background_task AS it WHERE task_id = task FOR UPDATE);
BEGIN
    UPDATE pg_dist_background_task SET pid = process, message = said,
           status = CASE WHEN was.status = 'cancelling' THEN 'cancelled' ELSE state END::citus_task_status,
           retry_count = CASE WHEN was.status = 'running' AND state = 'runnable' THEN coalesce(retry_count, 0) + 1
                              ELSE retry_count END,
           not_before = CASE WHEN was.status = 'running' AND state = 'runnable' THEN clock_timestamp() + '1 s' END
     WHERE task_id = task;
    UPDATE pg_dist_background_task SET status = 'runnable'
     WHERE state = 'done' AND status = 'blocked' AND task_id = (
           SELECT min(task_id) FROM pg_dist_background_task WHERE job_id = was.job_id AND status = 'blocked');
    PERFORM stand_in.update_job(was.job_id);
END $$;

-- What is called stuck stays.
CREATE PROCEDURE pg_catalog.citus_cleanup_orphaned_resources() LANGUAGE sql SECURITY DEFINER
    AS $$ DELETE FROM pg_catalog.pg_dist_cleanup WHERE object_name NOT LIKE 'stuck%' $$;

-- Copies each reference table to the nodes without it. Not for everybody: it must be granted.
CREATE FUNCTION pg_catalog.replicate_reference_tables(shard_transfer_mode citus.shard_transfer_mode = 'auto')
    RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('move'), shard.shardid::int)
       FROM pg_dist_shard AS shard JOIN pg_dist_partition AS table_ USING (logicalrelid)
      WHERE table_.repmodel = 't';
    PERFORM pg_sleep(seconds) FROM stand_in.copying;
    PERFORM stand_in.may_fail('replicate_reference_tables');
    INSERT INTO pg_dist_placement (shardid, groupid)
    SELECT shard.shardid, node.groupid
      FROM pg_dist_shard AS shard
      JOIN pg_dist_partition AS table_ ON table_.logicalrelid = shard.logicalrelid AND table_.repmodel = 't'
      CROSS JOIN pg_dist_node AS node
     WHERE node.noderole = 'primary'
       AND NOT EXISTS (SELECT FROM pg_dist_placement AS it WHERE it.shardid = shard.shardid AND it.groupid = node.groupid);
END $$;
REVOKE EXECUTE ON FUNCTION pg_catalog.replicate_reference_tables FROM PUBLIC;

-- Writes what the catalogue says of a table by hash: the group and the size of each of its shards.
CREATE FUNCTION stand_in.distribute(relation regclass, colocation int, groups int[], sizes bigint[])
    RETURNS void LANGUAGE plpgsql AS $$
DECLARE shard bigint;
BEGIN
    INSERT INTO pg_dist_partition (logicalrelid, partmethod, partkey, colocationid) VALUES (relation, 'h', 'id', colocation);
    FOR i IN 1 .. cardinality(groups) LOOP
        shard := nextval('stand_in.shardid');
        INSERT INTO pg_dist_shard (logicalrelid, shardid, shardminvalue, shardmaxvalue)
        VALUES (relation, shard, (i * 1000)::text, (i * 1000 + 999)::text);
        INSERT INTO pg_dist_placement (shardid, groupid) VALUES (shard, groups[i]);
        INSERT INTO stand_in.size VALUES (shard, sizes[i]);
    END LOOP;
END $$;

-- The same of a reference table, with a placement in each group.
CREATE FUNCTION stand_in.replicate(relation regclass, groups int[], bytes bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE shard bigint := nextval('stand_in.shardid');
BEGIN
    INSERT INTO pg_dist_partition (logicalrelid, partmethod, colocationid, repmodel) VALUES (relation, 'n', 99, 't');
    INSERT INTO pg_dist_shard (logicalrelid, shardid) VALUES (relation, shard);
    INSERT INTO pg_dist_placement (shardid, groupid) SELECT shard, unnest(groups);
    INSERT INTO stand_in.size VALUES (shard, bytes);
END $$;

RESET allow_system_table_mods;
