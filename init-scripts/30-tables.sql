-- The tables of the applications, on the coordinator (group 0). May be run twice. With Citus they are
-- distributed: memory_entries, patterns and graph_nodes by namespace and colocated, so that a question
-- about one namespace asks one shard; trajectories by id; the others stand on every node. On plain
-- PostgreSQL they are ordinary tables, and this script says so.

SET client_min_messages = 'warning';
\if :{?group}
\else
    \set group 0
\endif
SELECT :'group' = '0' AS is_coordinator,
    EXISTS (SELECT FROM pg_extension WHERE extname = 'citus') AS has_citus,
    EXISTS (SELECT FROM pg_extension WHERE extname = 'vector') AS has_vector
\gset
\if :is_coordinator
\else
    \if :has_citus
    \else
        \warn 'no tables in this group: without Citus all of them are in group 0'
    \endif
    \q
\endif
\if :has_vector
\else
    \warn 'no tables: the extension vector is missing'
    \q
\endif

-- As many as the embedding models have that this is for; HNSW indexes take 2000 at most.
\if :{?dimensions}
\else
    \set dimensions 384
\endif

-- On a cluster whose tables somebody else made, nothing is taken from them.
SET ROLE pgmesh_owner;

CREATE TABLE IF NOT EXISTS namespaces (
    namespace text PRIMARY KEY,
    description text,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS embedding_models (
    model text PRIMARY KEY,
    dimensions integer NOT NULL CHECK (dimensions BETWEEN 1 AND 2000),
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE IF NOT EXISTS memory_entries (
    namespace text NOT NULL,
    key text NOT NULL,
    value jsonb NOT NULL,
    metadata jsonb NOT NULL DEFAULT '{}',
    embedding vector(:dimensions),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    PRIMARY KEY (namespace, key)
);
CREATE TABLE IF NOT EXISTS patterns (
    namespace text NOT NULL,
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    kind text NOT NULL,
    pattern jsonb NOT NULL,
    confidence real NOT NULL DEFAULT 0 CHECK (confidence BETWEEN 0 AND 1),
    usage_count bigint NOT NULL DEFAULT 0,
    embedding vector(:dimensions),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (namespace, id)
);
CREATE TABLE IF NOT EXISTS graph_nodes (
    namespace text NOT NULL,
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    labels text[] NOT NULL DEFAULT '{}',
    properties jsonb NOT NULL DEFAULT '{}',
    -- Neighbours in the same namespace, and so on the same node: {"knows": ["<id>", …]}.
    edges jsonb NOT NULL DEFAULT '{}',
    embedding vector(:dimensions),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (namespace, id)
);
CREATE TABLE IF NOT EXISTS trajectories (
    id uuid NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY,
    namespace text NOT NULL,
    agent text NOT NULL,
    steps jsonb NOT NULL DEFAULT '[]',
    reward real,
    embedding vector(:dimensions),
    started_at timestamptz NOT NULL DEFAULT now(),
    ended_at timestamptz
);

CREATE INDEX IF NOT EXISTS memory_entries_embedding ON memory_entries USING hnsw (embedding vector_cosine_ops) WITH (m = 16, ef_construction = 64);
CREATE INDEX IF NOT EXISTS patterns_embedding ON patterns USING hnsw (embedding vector_cosine_ops) WITH (m = 16, ef_construction = 64);
CREATE INDEX IF NOT EXISTS graph_nodes_embedding ON graph_nodes USING hnsw (embedding vector_cosine_ops) WITH (m = 16, ef_construction = 64);
CREATE INDEX IF NOT EXISTS trajectories_embedding ON trajectories USING hnsw (embedding vector_cosine_ops) WITH (m = 16, ef_construction = 64);
CREATE INDEX IF NOT EXISTS memory_entries_expires_at ON memory_entries (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS patterns_kind ON patterns (namespace, kind);
CREATE INDEX IF NOT EXISTS graph_nodes_labels ON graph_nodes USING gin (labels);
CREATE INDEX IF NOT EXISTS trajectories_namespace ON trajectories (namespace, started_at);

\if :has_citus
    SELECT format('SELECT create_reference_table(%L)', name)
    FROM (VALUES ('namespaces'), ('embedding_models')) AS wanted (name)
    WHERE NOT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = name::regclass)
    \gexec
    SELECT format('SELECT create_distributed_table(%L, %L, colocate_with => %L)', name, distribution_column, colocate_with)
    FROM (VALUES (1, 'memory_entries', 'namespace', 'none'), (2, 'patterns', 'namespace', 'memory_entries'),
        (3, 'graph_nodes', 'namespace', 'memory_entries'), (4, 'trajectories', 'id', 'none')) AS wanted (place, name, distribution_column, colocate_with)
    WHERE NOT EXISTS (SELECT FROM pg_dist_partition WHERE logicalrelid = name::regclass)
    ORDER BY place
    \gexec
\else
    \warn 'ordinary tables, all of them in group 0: this database has no Citus'
\endif

GRANT SELECT, INSERT, UPDATE, DELETE ON namespaces, embedding_models, memory_entries, patterns, graph_nodes, trajectories TO pgmesh_app;
GRANT SELECT ON namespaces, embedding_models, memory_entries, patterns, graph_nodes, trajectories TO pgmesh_readonly, pgmesh_mcp;
GRANT INSERT ON memory_entries, patterns, trajectories TO pgmesh_mcp;
RESET ROLE;
