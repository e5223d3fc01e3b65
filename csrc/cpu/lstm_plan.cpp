#include "lstm_plan.h"

#include <algorithm>

#include "runtime.h"

namespace pyops::cpu {
namespace {

constexpr int64_t kMostRows = 96;  // of a group: its activations stay in the second-level cache
constexpr int64_t kCacheBytes = 768 << 10;  // weights that a core's second-level cache keeps
constexpr int64_t kSmall = 1 << 20;         // multiplications not worth waking a thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

LstmBlocks lstm_blocks(const LstmParams& p) {
  const Isa isa = active_isa();
  const int64_t H = p.hidden_size;
  const int64_t lanes = isa >= Isa::kAvx512 ? 16 : isa == Isa::kAvx2 ? 8 : 4;
  const int64_t half = lanes / 2;
  // Half a vector of units wastes less of a short or odd last block.
  const bool narrow = H < 8 * lanes && ceil_div(H, half) * half < ceil_div(H, lanes) * lanes;
  LstmBlocks b;
  b.lanes = lanes;
  b.pairs = isa == Isa::kAvx512Bf16 && p.dtype == DType::kBFloat16;
  b.vectors = narrow ? 2 : 4;
  b.units = narrow ? half : lanes;
  b.blocks = ceil_div(H, b.units);
  return b;
}

bool lstm_weights_cached(const LstmParams& p, const LstmBlocks& b) {
  const int64_t inputs = std::max(p.input_size, p.directions * p.hidden_size);
  return 4 * p.hidden_size * (inputs + p.hidden_size) * (b.pairs ? 2 : 4) <= kCacheBytes;
}

LstmGroups lstm_groups(const LstmParams& p, const LstmBlocks& b, int64_t units_at_once) {
  const int64_t H = p.hidden_size, inputs = std::max(p.input_size, p.directions * H);
  const int64_t products = p.rows * p.directions * p.layers * 4 * H * (inputs + H);
  const int64_t threads = products < kSmall ? 1 : num_threads();
  const int64_t share = std::max<int64_t>(1, threads / p.directions);  // of a direction
  // Every group of rows reads all weights: few rows pay that only where a cache holds them.
  const int64_t least_rows = lstm_weights_cached(p, b) ? 4 : 24;
  LstmGroups groups;
  groups.rows = std::min(share, std::max<int64_t>(1, p.batch / least_rows));
  const int64_t rest = share / groups.rows;
  groups.layers = p.directions == 1 ? std::min(rest, p.layers) : 1;
  groups.units = std::min(rest / groups.layers, std::max<int64_t>(1, H / units_at_once));
  while (ceil_div(p.batch, groups.rows) > kMostRows) groups.rows += share;
  return groups;
}

std::vector<int64_t> lstm_row_bounds(const LstmParams& p, int64_t groups) {
  std::vector<int64_t> bounds = {0};
  int64_t row = 0, elements = 0, length = p.steps;
  for (int64_t group = 1; group < groups; ++group) {
    if (!p.batch_sizes) {
      bounds.push_back(p.batch * group / groups);
      continue;
    }
    for (; row < p.batch && elements < p.rows * group / groups; ++row) {
      while (length > 0 && p.batch_sizes[length - 1] <= row) --length;
      elements += length;
    }
    bounds.push_back(row);
  }
  bounds.push_back(p.batch);
  return bounds;
}

}  // namespace pyops::cpu
