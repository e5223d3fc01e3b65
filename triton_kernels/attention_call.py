"""What a call of attention is to its kernels: sizes, flags and terms, descriptors, new tensors."""

from dataclasses import dataclass

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import common
from .attention_tile import Flags, Sizes, Strided, Terms

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
LOG2E = 1.4426950408889634
# Rows that backward prepares of each query are padded to a multiple of this, the largest block.
ROW_PADDING = 128
# Head dims of float32 above WHOLE are multiplied PIECE columns at a time.
WHOLE, PIECE = 16, 32


@dataclass(frozen=True)
class Options:
    """The schema's options, in its order."""

    scale: float
    softcap: float
    window_left: int
    window_right: int
    top_left: bool
    dropout_p: float


@dataclass(frozen=True)
class Packed:
    """Where the sequences of packed tensors lie: (batch + 1,) int32 each, and the longest ones."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class Call:
    """One call's shapes and the optional tensors, as the kernels take them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: Options
    packed: Packed | None
    bias: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    rng_state: torch.Tensor | None

    @property
    def batch(self) -> int:
        return self.packed.cu_seqlens_q.numel() - 1 if self.packed else self.query.size(0)

    @property
    def heads(self) -> int:
        return self.query.size(1)

    @property
    def kv_heads(self) -> int:
        return self.key.size(1)

    @property
    def seqlen_q(self) -> int:
        return self.packed.max_seqlen_q if self.packed else self.query.size(2)

    @property
    def seqlen_k(self) -> int:
        return self.packed.max_seqlen_k if self.packed else self.key.size(2)

    @property
    def head_dims(self) -> tuple[int, int]:
        return self.query.size(-1), self.value.size(-1)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        return (self.heads, self.query.size(0)) if self.packed else tuple(self.query.shape[:3])

    @property
    def padded_rows(self) -> int:
        """Rows a head of what backward prepares: each sequence starts at a multiple of ROW_PADDING."""
        if self.packed:
            return (self.query.size(0) // ROW_PADDING + self.batch) * ROW_PADDING
        return triton.cdiv(self.seqlen_q, ROW_PADDING) * ROW_PADDING

    def sizes(self, blocks: int) -> Sizes:
        rows = self.query.size(0) if self.packed else self.seqlen_q
        padded = self.padded_rows
        return Sizes(
            blocks,
            self.heads,
            self.seqlen_q,
            self.seqlen_k,
            0 if self.packed else self.heads * rows,
            rows,
            0 if self.packed else self.heads * padded,
            padded,
        )

    def terms(self, capacity: int = 0) -> Terms:
        """`capacity`: of a paged cache, which holds more than a page of keys."""
        options, any_pointer = self.options, self.query
        slopes, bias = self.alibi_slopes, self.bias
        if slopes is not None:
            slopes = slopes.contiguous()
        if bias is not None and bias.dtype is torch.bool:
            bias = bias.view(torch.uint8)
        bias_strides = [0] * 4 if bias is None else _broadcast_strides(bias)
        reach = self.seqlen_q + max(self.seqlen_k, capacity)
        return Terms(
            scale=float(options.scale),
            scale2=options.scale * LOG2E,
            softcap_scale=options.scale / options.softcap if options.softcap > 0 else 0.0,
            softcap2=options.softcap * LOG2E,
            left=min(options.window_left, reach),
            right=min(options.window_right, reach),
            alibi_slopes=any_pointer if slopes is None else slopes,
            alibi_batch=slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
            bias=any_pointer if bias is None else bias,
            bias_batch=bias_strides[0],
            bias_head=bias_strides[1],
            bias_row=bias_strides[2],
            bias_column=bias_strides[3],
            sinks=any_pointer if self.sinks is None else self.sinks.contiguous(),
            rng_state=any_pointer if self.rng_state is None else self.rng_state.contiguous(),
            threshold=min(round(options.dropout_p * 2**32), 2**32 - 1),
            keep_scale=1 / (1 - options.dropout_p),
            cu_seqlens_q=self.packed.cu_seqlens_q if self.packed else any_pointer,
            cu_seqlens_k=self.packed.cu_seqlens_k if self.packed else any_pointer,
        )

    def flags(self, *others: torch.Tensor) -> Flags:
        """`others`: what is read by rows besides query, key and value."""
        options, bias = self.options, self.bias
        head_dim, value_dim = self.head_dims
        dtype = self.query.dtype
        exact = dtype is torch.float32
        read = (self.query, self.key, self.value, *others)
        return Flags(
            VARLEN=self.packed is not None,
            LOADS=self._loads(read),
            FOLDED=options.scale > 0
            and options.softcap <= 0
            and bias is None
            and self.alibi_slopes is None,
            SOFTCAP=options.softcap > 0,
            ALIBI=self.alibi_slopes is not None,
            BIAS="none" if bias is None else "bool" if bias.dtype is torch.bool else "float",
            SINKS=self.sinks is not None,
            DROPOUT=options.dropout_p > 0,
            LEFT=options.window_left >= 0,
            RIGHT=options.window_right >= 0,
            TOP_LEFT=options.top_left,
            GROUP=self.heads // max(self.kv_heads, 1),
            D=head_dim,
            DV=value_dim,
            BLOCK_D=common.power_of_2(head_dim, 16, 256),
            BLOCK_DV=common.power_of_2(value_dim, 16, 256),
            PRECISION=dot_precision(dtype),
            PIECE=PIECE if self._in_pieces() else 0,
            PRECISE=exact,
            WIDE=common.needs_int64(*map(_extent, read), 0 if bias is None else _extent(bias)),
            UPCAST=common.INTERPRET,
        )

    def _in_pieces(self) -> bool:
        return self.query.dtype is torch.float32 and max(self.head_dims) > WHOLE

    def _loads(self, tensors: tuple[torch.Tensor, ...]) -> str:
        # float32 tiles loaded as boxes are held in twice the registers. (The interpreter has none.)
        if self._in_pieces() or (self.query.dtype is torch.float32 and not common.INTERPRET):
            return "pointers"
        # Below 9.0 there is no TMA, and descriptors would be emulated.
        if not common.INTERPRET and common.capability(self.query)[0] < 9:
            return "pointers"
        if not all(map(takes_boxes, tensors)):
            return "pointers"
        return "device" if self.packed else "host"

    def strided(self, tensor: torch.Tensor) -> Strided:
        if self.packed:
            return Strided(tensor, 0, tensor.stride(1), tensor.stride(0))
        return Strided(tensor, *tensor.stride()[:3])

    def descriptor(self, tensor: torch.Tensor, rows: int, width: int, flags: Flags):
        """Boxes of (rows, width) of a head, or None where the kernel makes its own or has none."""
        if flags.LOADS != "host":
            return None
        strides = _box_strides(tensor)
        return TensorDescriptor(tensor, list(tensor.shape), strides, [1, 1, rows, width])

    def like(self, tensor: torch.Tensor, width: int) -> torch.Tensor:
        """A new tensor in this one's layout, of another width."""
        shape = (*tensor.shape[:-1], width)
        if self.packed or tensor.is_contiguous() or not tensor.transpose(1, 2).is_contiguous():
            return tensor.new_empty(shape)
        batch, heads, seqlen, _ = shape
        return tensor.new_empty(batch, seqlen, heads, width).transpose(1, 2)


def takes_boxes(tensor: torch.Tensor) -> bool:
    """Whether TMA can read it: 16-byte alignment of the start and of every step."""
    return (
        tensor.numel() > 0
        and tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(
            stride > 0 and stride * tensor.itemsize % 16 == 0
            for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
            if size > 1
        )
        # One step past a row of odd width is no multiple of 16 bytes even if no step is taken.
        and (tensor.size(-1) * tensor.itemsize % 16 == 0)
    )


def _box_strides(tensor: torch.Tensor) -> list[int]:
    # torch's strides of axes of size 1 are arbitrary.
    whole = tensor.size(-1)
    return [
        stride if size > 1 else whole
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    ] + [1]


def _broadcast_strides(tensor: torch.Tensor) -> list[int]:
    return [
        stride if size > 1 else 0
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]


def _extent(tensor: torch.Tensor) -> int:
    """Elements from one end of a head, or of a packed tensor, to the other."""
    rows = tensor.size(0) * tensor.stride(0) if tensor.dim() == 3 else 0
    return max(rows, *(n * s for n, s in zip(tensor.shape[-2:], tensor.stride()[-2:], strict=True)))


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it if its last stride is not 1 (an expanded gradient's is 0)."""
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) == 1 else tensor.contiguous()


def dot_precision(dtype: torch.dtype) -> str:
    """The `input_precision` of tl.dot: for float32 TF32 where torch allows it in matrix products,
    otherwise three TF32 products, which keep 21 bits of each operand.
    """
    if dtype is not torch.float32 or common.INTERPRET:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def set_allocator(flags: Flags) -> None:
    """Descriptors that a kernel makes lie in global memory, which Triton asks for."""
    if flags.LOADS == "device" and not common.INTERPRET:
        triton.set_allocator(_allocate)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    # torch's blocks are aligned to 512 bytes and freed in the order of the current stream.
    return torch.empty(size, dtype=torch.int8, device="cuda")


def supports(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    spec: tuple,
    needs_grad: bool,
) -> str | None:
    """None if the Triton kernels take this call, else a sentence saying why not.

    The same for all three ops; in decoding key and value are the caches. Looks at shapes, dtypes and
    devices only, so fake and meta tensors do.
    """
    if query.dtype not in DTYPES or {key.dtype, value.dtype} != {query.dtype}:
        return (
            "the Triton kernels take float32, bfloat16 and float16, query, key and value alike, "
            f"not {query.dtype}, {key.dtype} and {value.dtype}"
        )
    narrowest, widest = sorted((query.size(-1), value.size(-1)))
    if narrowest < 1 or widest > MAX_HEAD_DIM:
        return f"the Triton kernels take head dims from 1 to {MAX_HEAD_DIM}, not {widest}"
    if query.device.type == "cpu" and not common.INTERPRET:
        return "the Triton kernels need a GPU (or TRITON_INTERPRET=1)"
    return None
