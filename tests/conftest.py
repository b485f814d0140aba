"""What every test shares: hypothesis profiles and the marks that depend on the machine."""

import os

import pytest
from hypothesis import settings

# Two processes round alike only with as many threads, and a process started by a test has one.
os.environ["OMP_NUM_THREADS"] = "1"
# Tests end processes, not machines: what was written outlives a process without reaching the disk.
os.fsync = lambda _: None
# A machine under load is slow, not wrong: no deadline. CI repeats the same examples every time.
settings.register_profile("dev", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=100, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu on a machine without one."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


WORDS = "the cat sat on a mat while one dog ran far from its house to see blue birds".split()


def build_model(folder, *, causal=True, pooling="mean", max_length=32, seed=0, **sizes):
    """Write a random tiny Qwen2 with its own byte-level BPE tokenizer; return its Embedder."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    from kalm_min import Embedder
    from kalm_min.model import ModelConfig, Qwen2, initialise
    from kalm_min.tokenizer import Tokenizer

    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    config = ModelConfig(
        **{
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 512,
            "initializer_range": 0.3,
        }
        | sizes
    )
    model = Qwen2(config)
    initialise(model, seed)
    settings = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    embedder = Embedder(
        model, Tokenizer(fast, settings), causal=causal, pooling=pooling, max_length=max_length
    )
    embedder.save_pretrained(folder)
    return embedder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A folder with a random tiny causal Qwen2, mean pooling, 32 tokens at most."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    build_model(folder)
    return folder


@pytest.fixture(scope="session")
def make_model():
    """`build_model`: make_model(folder, causal=..., pooling=..., max_length=..., **sizes)."""
    return build_model
