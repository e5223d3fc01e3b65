// Cuts the LSTM's forward pass into chains, lays out its scratch, and runs it.
#include <algorithm>
#include <cstring>
#include <vector>

#include "chains.h"
#include "lstm_plan.h"
#include "runtime.h"

namespace pyops::cpu {
namespace {

constexpr int64_t kMostRows = 96;   // of a chain: its activations stay in the second-level cache
constexpr int64_t kFewRows = 16;    // below, input products are made for several steps at once
constexpr int64_t kChunkRows = 96;  // of these products
constexpr int64_t kCacheBytes = 768 << 10;  // weights that a core keeps in its second-level cache
constexpr int64_t kSmall = 1 << 20;         // multiplications not worth waking a thread

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Hands out parts of one buffer; before it has one it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* part = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
    return part;
  }
  size_t used() const { return static_cast<size_t>(used_); }

 private:
  char* base_;
  int64_t used_ = 0;
};

struct Forward {
  LstmPlan plan{};
  int64_t row_groups, unit_groups, layer_groups;  // layers that run at the same time
  std::vector<LstmChain> chains;
  std::vector<LstmLayerScratch> scratch;
  std::vector<LstmSequence> hidden;

  explicit Forward(const LstmParams& p) {
    plan.p = p;
    choose_blocks();
    choose_groups();
    make_chains();
  }

  void choose_blocks() {
    const Isa isa = active_isa();
    const int64_t H = plan.p.hidden_size;
    plan.lanes = isa >= Isa::kAvx512 ? 16 : isa == Isa::kAvx2 ? 8 : 4;
    plan.pairs = isa == Isa::kAvx512Bf16 && plan.p.dtype == DType::kBFloat16;
    // Half a vector of units wastes less of a short or odd last block.
    const int64_t half = plan.lanes / 2;
    const bool narrow =
        ceil_div(H, half) * half < ceil_div(H, plan.lanes) * plan.lanes && H < 8 * plan.lanes;
    plan.vectors = narrow ? 2 : 4;
    plan.units = narrow ? half : plan.lanes;
    plan.blocks = ceil_div(H, plan.units);
  }

  void choose_groups() {
    const LstmParams& p = plan.p;
    const int64_t H = p.hidden_size, widest = std::max(p.input_size, p.directions * H);
    const int64_t products = p.rows * p.directions * p.layers * 4 * H * (widest + H);
    const int64_t threads = products < kSmall ? 1 : num_threads();
    const int64_t share = std::max<int64_t>(1, threads / p.directions);  // of a direction
    const int64_t element = plan.pairs ? 2 : 4;
    const bool cached = 4 * H * (widest + H) * element <= kCacheBytes;
    // Every group of rows reads all weights: few rows pay that only where a cache holds them.
    const int64_t least_rows = cached ? 4 : 24;
    row_groups = std::min(share, std::max<int64_t>(1, p.batch / least_rows));
    const int64_t rest = share / row_groups;
    layer_groups = p.directions == 1 ? std::min(rest, p.layers) : 1;
    unit_groups = std::min(rest / layer_groups, std::max<int64_t>(1, H / 32));
    while (ceil_div(p.batch, row_groups) > kMostRows) row_groups += share;
    const int64_t rows = ceil_div(p.batch, row_groups);
    plan.apart = unit_groups > 1 || rows < kFewRows;
    plan.chunk = std::max<int64_t>(plan.apart ? ceil_div(kChunkRows, rows) : 8, 8);
    if (layer_groups > 1) plan.chunk = std::min(plan.chunk, std::max<int64_t>(1, p.steps / 8));
    plan.chunk = std::min(plan.chunk, p.steps);
  }

  // Row groups of about equally many elements, which the rows of a packed sequence differ in.
  std::vector<int64_t> row_bounds() const {
    const LstmParams& p = plan.p;
    std::vector<int64_t> bounds = {0};
    int64_t row = 0, done = 0, t = p.steps;
    for (int64_t group = 1; group < row_groups; ++group) {
      if (!p.batch_sizes) {
        bounds.push_back(p.batch * group / row_groups);
        continue;
      }
      for (; row < p.batch && done < p.rows * group / row_groups; ++row) {
        while (t > 0 && p.batch_sizes[t - 1] <= row) --t;
        done += t;  // the row's length
      }
      bounds.push_back(row);
    }
    bounds.push_back(p.batch);
    return bounds;
  }

  void make_chains() {
    const std::vector<int64_t> bounds = row_bounds();
    for (int64_t index = 0; index < plan.p.layers * plan.p.directions; ++index) {
      for (int64_t r = 0; r < row_groups; ++r) {
        for (int64_t u = 0; u < unit_groups; ++u) {
          chains.push_back({index, bounds[r], bounds[r + 1], plan.blocks * u / unit_groups,
                            plan.blocks * (u + 1) / unit_groups, nullptr, nullptr});
        }
      }
    }
  }

  void lay_out(Arena* arena) {
    const LstmParams& p = plan.p;
    const int64_t floats = plan.block_floats();
    scratch.clear();
    hidden.clear();
    for (int64_t index = 0; index < p.layers * p.directions; ++index) {
      LstmLayerScratch s;
      s.packed = arena->take<float>(plan.blocks * plan.block_words(index) * floats);
      s.bias = arena->take<float>(plan.blocks * floats);
      s.activations = arena->take<char>(2 * p.batch * plan.activation_bytes(index));
      s.cell = arena->take<float>(p.batch * plan.blocks * plan.units);
      scratch.push_back(s);
    }
    const int64_t features = p.directions * p.hidden_size, bytes = element_size(p.dtype);
    for (int64_t layer = 0; layer + 1 < p.layers; ++layer) {
      char* data = p.saved ? static_cast<char*>(p.saved) + p.saved_output(layer) * bytes
                           : arena->take<char>(p.rows * features * bytes);
      hidden.push_back({data, p.batch * features, features});
    }
    for (LstmChain& chain : chains) {
      if (!plan.apart) break;
      const int64_t rows = plan.projected_rows(chain);
      chain.projected = arena->take<float>((chain.block_end - chain.block_begin) * rows * floats);
      chain.projected_in = arena->take<char>(rows * 4 * plan.input_words(chain.index));
    }
    plan.chains = chains.data();
    plan.scratch = scratch.data();
    plan.hidden = hidden.data();
  }

  void run() {
    const LstmParams& p = plan.p;
    Arena counted(nullptr);
    lay_out(&counted);
    Arena arena(pyops::cpu::scratch(0, counted.used()));
    lay_out(&arena);

    const SingleThread scope(chains_of_workers() == 1);
    const int64_t indices = p.layers * p.directions;
    const auto prepare = PYOPS_ISA_SELECT(lstm_prepare);
    parallel_for(indices * plan.blocks,
                 [&](int64_t task) { prepare(plan, task / plan.blocks, task % plan.blocks); });

    // Steps of a task: siblings wait for each other after each.
    const int64_t steps = unit_groups > 1 ? 1 : plan.chunk, tasks = ceil_div(p.steps, steps);
    const int64_t per_index = row_groups * unit_groups;
    Chains work;
    for (const LstmChain& chain : chains) {
      const int64_t number = &chain - chains.data(), place = number % per_index;
      const int64_t layer = chain.index / p.directions, direction = chain.index % p.directions;
      work.add(tasks, worker_of(place, layer, direction));
      if (unit_groups > 1) work.need(number, {number - place % unit_groups, unit_groups, 0});
      for (int64_t d = 0; d < p.directions && layer > 0; ++d) {
        // The other direction's first steps are the last of the layer below.
        const int64_t below = ((layer - 1) * p.directions + d) * per_index;
        const int64_t ahead = plan.apart && steps == 1 ? plan.chunk : 1;
        work.need(number, {below + place - place % unit_groups, unit_groups,
                           p.directions > 1 ? tasks : ahead});
      }
    }
    const auto run = PYOPS_ISA_SELECT(lstm_run);
    work.run([&](int64_t chain, int64_t task) {
      run(plan, chains[chain], task * steps, std::min((task + 1) * steps, p.steps));
    });
  }

  int64_t worker_of(int64_t place, int64_t layer, int64_t direction) const {
    const int64_t threads = std::max<int64_t>(1, num_threads());
    return ((place * layer_groups + layer % layer_groups) * plan.p.directions + direction) %
           threads;
  }

  int64_t chains_of_workers() const {
    return row_groups * unit_groups * layer_groups * plan.p.directions;
  }
};

}  // namespace

void lstm_forward(const LstmParams& p) { Forward(p).run(); }

}  // namespace pyops::cpu
