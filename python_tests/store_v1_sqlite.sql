-- A store as schema version 1 wrote it.
CREATE TABLE prompts (
    id INTEGER NOT NULL,
    hash BLOB NOT NULL,
    content_hash BLOB NOT NULL,
    content TEXT NOT NULL,
    token_ids BLOB,
    tests TEXT NOT NULL,
    answer TEXT NOT NULL,
    split TEXT NOT NULL,
    created_at DOUBLE NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (hash)
);
CREATE INDEX ix_prompts_content_hash ON prompts (content_hash);
CREATE TABLE spo_schema (
    version INTEGER NOT NULL,
    PRIMARY KEY (version)
);
CREATE TABLE prompt_values (
    prompt_id INTEGER NOT NULL,
    reference TEXT NOT NULL,
    beta DOUBLE NOT NULL,
    temperature DOUBLE NOT NULL,
    top_p DOUBLE NOT NULL,
    value DOUBLE NOT NULL,
    n BIGINT NOT NULL,
    PRIMARY KEY (prompt_id, reference, beta, temperature, top_p),
    FOREIGN KEY(prompt_id) REFERENCES prompts (id)
);
CREATE TABLE trajectories (
    id INTEGER NOT NULL,
    hash BLOB NOT NULL,
    prompt_id INTEGER NOT NULL,
    token_ids BLOB NOT NULL,
    num_tokens INTEGER NOT NULL,
    reward DOUBLE NOT NULL,
    reason TEXT NOT NULL,
    kind TEXT NOT NULL,
    run TEXT,
    policy_version BIGINT,
    model TEXT,
    finish TEXT NOT NULL,
    behaviour_logprobs BLOB,
    temperature DOUBLE,
    top_p DOUBLE,
    created_at DOUBLE NOT NULL,
    duplicates BIGINT DEFAULT '0' NOT NULL,
    PRIMARY KEY (id),
    UNIQUE (hash),
    FOREIGN KEY(prompt_id) REFERENCES prompts (id)
);
CREATE INDEX ix_trajectories_prompt_id ON trajectories (prompt_id);
CREATE TABLE ref_logprobs (
    trajectory_id INTEGER NOT NULL,
    fingerprint TEXT NOT NULL,
    logprobs BLOB NOT NULL,
    PRIMARY KEY (trajectory_id, fingerprint),
    FOREIGN KEY(trajectory_id) REFERENCES trajectories (id)
);
INSERT INTO prompts (id, hash, content_hash, content, token_ids, tests, answer, split, created_at)
  VALUES (1, X'13bd87c17d1e3be851a832ee53dd8567aefbacfc19c213b215c15566c7831212', X'53eac4ef1ed50a3f46aeeea79e496beaafdb642320792c24cc8bda0574b3ac10', '"2 + 2 ="', X'4811000400', 'null', '"4"', 'train', 1795272042.6990883);
INSERT INTO prompts (id, hash, content_hash, content, token_ids, tests, answer, split, created_at)
  VALUES (2, X'ca0b1c63ac7cd0d25563b54bdcedd84b87c9c857b2dee0746cd5e2c31914af5e', X'e90f57c831299713379e0dc19c5f94abfecc2204cc53127a89ae8ccff46e4953', '[{"content":"hello","role":"user"}]', NULL, '[["a","b"]]', 'null', 'test', 1795272042.6991234);
INSERT INTO spo_schema (version)
  VALUES (1);
INSERT INTO prompt_values (prompt_id, reference, beta, temperature, top_p, value, n)
  VALUES (1, '', 0.1, 0.75, 1.0, -0.5, 16);
INSERT INTO trajectories (id, hash, prompt_id, token_ids, num_tokens, reward, reason, kind, run, policy_version, model, finish, behaviour_logprobs, temperature, top_p, created_at, duplicates)
  VALUES (1, X'8f745c5318568b1b9576b229af62ffdaf4e0cf5b10785be90fa3518e57cb8cd0', 1, X'4813000100', 2, 1.0, '"right"', 'policy', 'first', 3, NULL, 'eos', X'000000bf000080be', 0.75, 1.0, 1795272042.7101896, 1);
INSERT INTO trajectories (id, hash, prompt_id, token_ids, num_tokens, reward, reason, kind, run, policy_version, model, finish, behaviour_logprobs, temperature, top_p, created_at, duplicates)
  VALUES (2, X'f46d9df5925ccacbf1f37a007ef2ee4973bd9bc0cffdb9d0493562a7e8ac29c2', 1, X'497011010001000000', 2, -1.0, '""', 'model', NULL, NULL, 'other', 'truncated', NULL, NULL, NULL, 1795272042.7102268, 0);
INSERT INTO trajectories (id, hash, prompt_id, token_ids, num_tokens, reward, reason, kind, run, policy_version, model, finish, behaviour_logprobs, temperature, top_p, created_at, duplicates)
  VALUES (3, X'db56415f29bdcc73b49d799ed52ecea80d29f5043eb7537c69e730d8bb320d47', 2, X'480500', 1, 0.5, '""', 'human', NULL, NULL, NULL, 'eos', NULL, NULL, NULL, 1795272042.7102501, 0);
INSERT INTO ref_logprobs (trajectory_id, fingerprint, logprobs)
  VALUES (1, 'frozen', X'000040bf000000be');
