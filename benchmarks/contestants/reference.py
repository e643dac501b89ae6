"""The least that trains the model: bare modules, SDPA, fused AdamW, clipping, and nothing else. Needs only torch."""

import torch
import torch.nn.functional as F
from protocol import BETAS, LR, MAX_NORM, WEIGHT_DECAY, Session, Sizes
from torch import Tensor, nn

EPS = 1e-5


def rope_table(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """cos and sin (seq, head_dim) for rotate-half RoPE."""
    frequencies = 10_000.0 ** (-torch.arange(0, sizes.head_dim, 2) / sizes.head_dim)
    angles = torch.outer(torch.arange(sizes.seq_len).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (batch, heads, seq, head_dim) turned by its positions' angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, dim)."""
        return F.rms_norm(x, self.weight.shape, self.weight, EPS)


class Layer(nn.Module):
    """Attention and SwiGLU, both behind a norm."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head_dim = sizes.head_dim
        kv_dim = sizes.n_kv_heads * sizes.head_dim
        self.attention_norm, self.mlp_norm = Norm(sizes.dim), Norm(sizes.dim)
        self.q = nn.Linear(sizes.dim, sizes.dim, bias=False)
        self.k = nn.Linear(sizes.dim, kv_dim, bias=False)
        self.v = nn.Linear(sizes.dim, kv_dim, bias=False)
        self.o = nn.Linear(sizes.dim, sizes.dim, bias=False)
        self.gate = nn.Linear(sizes.dim, sizes.ffn_dim, bias=False)
        self.up = nn.Linear(sizes.dim, sizes.ffn_dim, bias=False)
        self.down = nn.Linear(sizes.ffn_dim, sizes.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(batch, seq, dim) → (batch, seq, dim)."""
        h = self.attention_norm(x)
        q, k, v = (m(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin).type_as(v), rotate(k, cos, sin).type_as(v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """A tied Llama that returns its mean loss."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocab_size, sizes.dim)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.n_layers))
        self.norm = Norm(sizes.dim)
        cos, sin = rope_table(sizes)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, 0.0, 0.02)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of (batch, seq) labels, 0-dim float32."""
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def random_batch(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Token ids and labels (batch, seq) int64."""
    tokens = torch.randint(sizes.vocab_size, (sizes.batch, sizes.seq_len + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def main() -> None:
    """Build, then train as the driver says."""
    session = Session(__doc__)
    torch.manual_seed(0)
    model = Model(session.sizes)
    parameters = sum(p.numel() for p in model.parameters())
    if session.cell.precision == "bf16-parameters":
        model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    run = torch.compile(model) if session.cell.compiled else model
    autocast = session.cell.precision == "bf16-autocast"
    dtype = "float32" if session.cell.precision == "fp32" else "bfloat16"
    session.ready(parameters, dtype, torch.get_num_threads(), torch=torch.__version__)
    while True:
        ids, labels = random_batch(session.sizes)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = run(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if not session.step_done(loss.detach()):
            return


if __name__ == "__main__":
    main()
