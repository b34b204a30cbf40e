"""What the runs share: the defaults of `fot.config`, the paper's small models, and LongLLaMA."""

import ml_collections

from fot import config as config_lib


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults of every field, locked: a field that does not exist can't be set by a typo."""
    return ml_collections.ConfigDict(config_lib.to_dict(config_lib.ExperimentConfig())).lock()


def paper() -> ml_collections.ConfigDict:
    """Returns what the paper's models of 37M to 1.2B share (FoT, section 4 and Appendix A).

    The paper counts a batch in tokens of C_curr. Here a pack is a pair of rows, C_prev and C_curr, with the loss on
    C_curr alone, so `data.batch_size` is twice the paper's rows: 32k tokens of context 512 are 64 pairs, 128 rows.
    Only so do 64 documents fit that d = 64 needs.
    """
    config = get_config()
    config.model.layers = 12
    config.model.memory_layers = (8,)
    config.model.mlp = "gelu"
    config.model.qk_norm = True
    config.model.memory_positions = "none"
    config.model.tied_embeddings = True
    config.model.rope_theta = 1e4
    config.model.compute_dtype = "bfloat16"
    config.crossbatch.variant = "previous"
    config.crossbatch.packing = 2
    config.crossbatch.w = 1
    config.crossbatch.loss_rows = "last"
    config.optimizer.name = "adafactor"
    config.optimizer.schedule = "rsqrt"
    config.optimizer.warmup_steps = 1000
    config.optimizer.beta1 = 0.9
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 0.0  # AdaFactor clips each update by itself
    documents(config)
    cluster(config)
    config.evaluate.readers = ("knn",)
    config.evaluate.neighbours = 128
    return config


def paper_37m() -> ml_collections.ConfigDict:
    """Returns the paper's 37M: vocabulary 64, context 256, d from 1 to 128 at 98% accuracy (FoT, Appendix D).

    A batch is 128 documents of 512 tokens (64k): definitions in the first row, C_prev, and questions in the second.
    """
    config = paper()
    config.model.vocab_size = 64
    config.model.dim = 512
    config.model.heads = config.model.kv_heads = 8
    config.model.head_dim = 64
    config.model.mlp_dim = 2048
    config.crossbatch.d = (1, 128)
    config.crossbatch.d_schedule = "accuracy"
    config.crossbatch.d_accuracy = 0.98
    config.data.context = 256
    config.data.batch_size = 256
    config.data.min_document_tokens = (512,)
    config.optimizer.learning_rate = 0.02
    config.optimizer.min_learning_rate = 0.01
    config.train.steps = 5_000
    config.train.evaluate_every = 200
    config.train.checkpoint_every = 500
    config.train.keep_every = 0
    config.evaluate.neighbours = 32
    config.evaluate.memory = (0, 256, 4096, 16384, 65536)
    return config


def paper_large() -> ml_collections.ConfigDict:
    """Returns what the paper's two large models share (FoT, section 4): vocabulary of 64k, context 2048, d = 2."""
    config = paper()
    config.model.vocab_size = 64_000
    config.model.dim = 2048
    config.model.head_dim = 128
    config.model.remat = "elementwise"
    config.model.attention_block = 512
    config.crossbatch.d = (2,)
    config.data.context = 2048
    config.data.batch_size = 256  # 256k tokens of C_curr
    config.data.min_document_tokens = (4096,)
    config.optimizer.learning_rate = 5e-3
    config.optimizer.min_learning_rate = 5e-4
    config.evaluate.memory = (0, 2048, 4096, 16384, 65536)
    return config


def longllama() -> ml_collections.ConfigDict:
    """Returns what the LongLLaMA models share: LLaMA's architecture and the recipe of FoT, section 5.

    4 rows of 2048 tokens continue one document: 8k tokens of context in all.
    """
    config = get_config()
    config.model.mlp = "swiglu"
    config.model.qk_norm = False
    config.model.memory_positions = "zero"
    config.model.tied_embeddings = False
    config.model.vocab_size = 32_000
    config.model.rope_theta = 1e4
    config.model.norm_epsilon = 1e-6
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "full"
    config.model.attention_block = 512
    config.crossbatch.variant = "segments"
    config.crossbatch.packing = 4
    config.crossbatch.loss_rows = "all"
    config.optimizer.name = "adamw"
    config.optimizer.schedule = "constant"
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 0
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    documents(config)
    config.data.context = 2048
    config.data.batch_size = 128  # 256k tokens
    config.data.min_document_tokens = (1024,)
    cluster(config)
    config.evaluate.memory = (0, 2048, 6144, 16384, 65536)
    config.evaluate.readers = ("dense",)
    config.evaluate.modes = ("single_doc",)
    return config


def documents(config: ml_collections.ConfigDict) -> None:
    """Sets placeholders for the user's own documents and tokenizer; a run names them by its overrides."""
    config.data.task = ("files",)
    config.data.files = ("documents/**/*.txt",)
    config.data.tokenizer = "file"
    config.data.tokenizer_file = "tokenizer.model"


def cluster(config: ml_collections.ConfigDict) -> None:
    """Sets the habits of a run of days: rarer lines, losses and checkpoints."""
    config.train.log_every = 50
    config.train.evaluate_every = 1000
    config.train.checkpoint_every = 1000
    config.train.keep_every = 10_000
    config.evaluate.max_documents = 256


def dictionary(config: ml_collections.ConfigDict) -> None:
    """Sets dictionary lookup: definitions in C_prev, questions in C_curr, the loss on these alone (FoT, Appendix D)."""
    config.model.vocab_size = 64
    config.crossbatch.variant = "previous"
    config.crossbatch.packing = 2
    config.crossbatch.loss_rows = "last"
    config.crossbatch.d_schedule = "accuracy"
    config.crossbatch.d_accuracy = 0.98
    config.data.task = ("dictionary",)
    config.data.files = ("",)
    config.data.context = 256
    config.evaluate.readers = ("knn",)
    config.evaluate.neighbours = 32


def passkey(config: ml_collections.ConfigDict) -> None:
    """Sets passkey retrieval: the key in any row of a pack, the question in the last, the loss on its answer alone."""
    config.model.vocab_size = 64
    config.crossbatch.variant = "previous"
    config.crossbatch.loss_rows = "last"
    config.data.task = ("passkey",)
    config.data.files = ("",)
    config.generate.reader = "knn"
    config.generate.last_context_length = 32
    config.evaluate.neighbours = 32
