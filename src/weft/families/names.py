"""Facts about architectures that a recorder needs, kept by class name.

By name, because a fact must hold for a module built on the meta device, on a service that publishes
only the names, and without importing `transformers`.
"""

from __future__ import annotations

from torch import nn

# Decoder layers and expert blocks whose forward returned a tuple in some release of transformers 4
# and returns one tensor in transformers 5. Found by reading the `return` statements of 4.46.3,
# 4.52.4, 4.57.6 and 5.23.0. Not here, because they return a tuple in both: BloomBlock,
# CodeGenBlock, FalconDecoderLayer, GPTJBlock, GPTNeoBlock, MptBlock, T5Block and all attention
# modules.
_RETURNED_TUPLE_BEFORE = """
    AriaTextDecoderLayer BartDecoderLayer BertLayer BigBirdLayer BigBirdPegasusDecoderLayer
    BioGptDecoderLayer BitNetDecoderLayer BlenderbotDecoderLayer BlenderbotSmallDecoderLayer
    CamembertLayer Cohere2DecoderLayer CohereDecoderLayer CsmDecoderLayer Data2VecTextLayer
    DbrxBlock DeepseekV3DecoderLayer DiffLlamaDecoderLayer ElectraLayer Emu3DecoderLayer
    Ernie4_5_MoeSparseMoeBlock ErnieLayer FlexOlmoSparseMoeBlock GPT2Block GPTBigCodeBlock
    GPTNeoXLayer Gemma2DecoderLayer Gemma3DecoderLayer Gemma3nTextDecoderLayer GemmaDecoderLayer
    GitLayer Glm4DecoderLayer GlmDecoderLayer GraniteDecoderLayer GraniteMoeDecoderLayer
    GraniteMoeHybridDecoderLayer GraniteMoeSharedDecoderLayer HeliumDecoderLayer
    JambaAttentionDecoderLayer JambaMambaDecoderLayer JambaSparseMoeBlock Kosmos2TextBlock
    Kosmos2_5TextBlock Llama4TextDecoderLayer LlamaDecoderLayer MBartDecoderLayer MarianDecoderLayer
    MiniMaxSparseMoeBlock MistralDecoderLayer MixtralDecoderLayer MixtralSparseMoeBlock
    MllamaCrossAttentionDecoderLayer MllamaSelfAttentionDecoderLayer MoshiDecoderLayer
    MusicgenDecoderLayer NemotronDecoderLayer OPTDecoderLayer Olmo2DecoderLayer OlmoDecoderLayer
    OlmoeDecoderLayer OlmoeSparseMoeBlock PLBartDecoderLayer PegasusDecoderLayer
    PersimmonDecoderLayer Phi3DecoderLayer Phi4MultimodalDecoderLayer PhiDecoderLayer
    PhimoeDecoderLayer PhimoeSparseMoeBlock Qwen2DecoderLayer Qwen2MoeDecoderLayer
    Qwen2MoeSparseMoeBlock Qwen3DecoderLayer Qwen3MoeDecoderLayer Qwen3MoeSparseMoeBlock
    Qwen3NextSparseMoeBlock RoCBertLayer RobertaLayer RobertaPreLayerNormLayer StableLmDecoderLayer
    Starcoder2DecoderLayer VaultGemmaDecoderLayer WhisperDecoderLayer XGLMDecoderLayer
    XLMRobertaLayer XLMRobertaXLLayer XmodLayer Zamba2AttentionDecoderLayer Zamba2HybridLayer
    Zamba2MambaDecoderLayer ZambaAttentionDecoderLayer ZambaHybridLayer ZambaMambaDecoderLayer
"""
RETURNED_TUPLE_BEFORE = frozenset(_RETURNED_TUPLE_BEFORE.split())


def returned_tuple_before(module: nn.Module | type[nn.Module]) -> bool:
    """Whether `[0]` on this module's output used to mean "the hidden states".

    Today it is the first batch row: a recorder warns once when it sees it.
    """
    kind = module if isinstance(module, type) else type(module)
    return kind.__name__ in RETURNED_TUPLE_BEFORE
