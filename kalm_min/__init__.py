"""KaLM-Embedding: a Qwen2 decoder as a text embedder, with training, mining and evaluation.

`from kalm_min import Embedder` is all that encoding needs. Names are resolved when first used
(PEP 562), so that `import kalm_min.sampling` plans an epoch without waiting for torch.
"""

TYPE_CHECKING = False  # typing's own takes longer to import than all else before Ctrl-C is in hand
if TYPE_CHECKING:
    from kalm_min.embedder import Embedder

__version__ = "0.1.0"
__all__ = ["Embedder", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Embedder":
        from kalm_min.embedder import Embedder

        return Embedder
    raise AttributeError(f"module 'kalm_min' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
