// Cuts the LSTM's forward pass into chains, lays out its scratch, and runs it.
#include <algorithm>
#include <vector>

#include "arena.h"
#include "chains.h"
#include "lstm_plan.h"
#include "runtime.h"

namespace pyops::cpu {
namespace {

constexpr int64_t kFewRows = 16;    // below, input products are made for several steps at once
constexpr int64_t kChunkRows = 96;  // of these products
constexpr int64_t kChunkSteps = 8;  // a layer runs before the next one follows

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Forward {
 public:
  explicit Forward(const LstmParams& p) {
    static_cast<LstmBlocks&>(plan_) = lstm_blocks(p);
    plan_.p = p;
    groups_ = lstm_groups(p, plan_, 2 * plan_.lanes);
    const int64_t rows = ceil_div(p.batch, groups_.rows);
    // Chosen by the shapes alone: it decides the order of the sums.
    plan_.apart = p.batch < kFewRows || !lstm_weights_cached(p, plan_);
    if (!plan_.apart) groups_.units = 1;
    plan_.chunk = std::max(plan_.apart ? ceil_div(kChunkRows, rows) : 0, kChunkSteps);
    if (groups_.layers > 1) {  // an upper layer starts after the lower one's first chunk
      plan_.chunk = std::min(plan_.chunk, std::max<int64_t>(1, p.steps / 8));
    }
    plan_.chunk = std::min(plan_.chunk, p.steps);
    const std::vector<int64_t> bounds = lstm_row_bounds(p, groups_.rows);
    for (int64_t index = 0; index < p.layers * p.directions; ++index) {
      for (int64_t r = 0; r < groups_.rows; ++r) {
        for (int64_t u = 0; u < groups_.units; ++u) {
          chains_.push_back({index, bounds[r], bounds[r + 1], plan_.blocks * u / groups_.units,
                             plan_.blocks * (u + 1) / groups_.units, nullptr, nullptr});
        }
      }
    }
    Arena counted;
    lay_out(&counted);
    Arena arena(scratch(0, counted.used()));
    lay_out(&arena);
  }

  void run() const {
    const LstmParams& p = plan_.p;
    const SingleThread scope(groups_.rows * groups_.units * groups_.layers * p.directions == 1);
    const auto prepare = PYOPS_ISA_SELECT(lstm_prepare);
    parallel_for(p.layers * p.directions * plan_.blocks,
                 [&](int64_t task) { prepare(plan_, task / plan_.blocks, task % plan_.blocks); });
    // Chains of other units wait for each other after every step.
    const int64_t steps = groups_.units > 1 ? 1 : plan_.chunk;
    const auto run_chain = PYOPS_ISA_SELECT(lstm_run);
    make_chains(steps).run([&](int64_t chain, int64_t task) {
      run_chain(plan_, chains_[chain], task * steps, std::min((task + 1) * steps, p.steps));
    });
  }

 private:
  void lay_out(Arena* arena) {
    const LstmParams& p = plan_.p;
    const int64_t floats = plan_.block_floats();
    layers_.clear();
    hidden_.clear();
    for (int64_t index = 0; index < p.layers * p.directions; ++index) {
      layers_.push_back({arena->take<float>(plan_.blocks * plan_.block_words(index) * floats),
                         arena->take<float>(plan_.blocks * floats),
                         arena->take<char>(2 * p.batch * plan_.activation_bytes(index)),
                         arena->take<float>(p.batch * plan_.padded_hidden())});
    }
    const int64_t features = p.directions * p.hidden_size, bytes = element_size(p.dtype);
    for (int64_t layer = 0; layer + 1 < p.layers; ++layer) {
      char* data = p.saved ? static_cast<char*>(p.saved) + p.saved_output(layer) * bytes
                           : arena->take<char>(p.rows * features * bytes);
      hidden_.push_back({data, p.batch * features, features});
    }
    for (LstmChain& chain : chains_) {
      if (!plan_.apart) break;
      const int64_t rows = plan_.projected_rows(chain);
      chain.projected = arena->take<float>((chain.block_end - chain.block_begin) * rows * floats);
      chain.projected_in = arena->take<char>(rows * 4 * plan_.input_words(chain.index));
    }
    plan_.layers = layers_.data();
    plan_.hidden = hidden_.data();
  }

  Chains make_chains(int64_t steps) const {
    const LstmParams& p = plan_.p;
    const int64_t per_index = groups_.rows * groups_.units, tasks = ceil_div(p.steps, steps);
    const int64_t threads = std::max(1, num_threads());
    Chains work;
    for (const LstmChain& chain : chains_) {
      const int64_t number = &chain - chains_.data(), place = number % per_index;
      const int64_t siblings = place - place % groups_.units;
      const int64_t layer = chain.index / p.directions, direction = chain.index % p.directions;
      const int64_t worker =
          (place * groups_.layers + layer % groups_.layers) * p.directions + direction;
      work.add(tasks, worker % threads);
      if (groups_.units > 1) {
        work.need(number, {chain.index * per_index + siblings, groups_.units, 0});
      }
      for (int64_t d = 0; d < p.directions && layer > 0; ++d) {
        // The other direction's first steps are the last of the layer below; input products
        // are made a chunk ahead.
        const int64_t lead = p.directions > 1 ? tasks : steps == 1 ? plan_.chunk : 1;
        const int64_t below = ((layer - 1) * p.directions + d) * per_index;
        work.need(number, {below + siblings, groups_.units, lead});
      }
    }
    return work;
  }

  LstmPlan plan_{};
  LstmGroups groups_;
  std::vector<LstmChain> chains_;
  std::vector<LstmLayerScratch> layers_;
  std::vector<LstmSequence> hidden_;
};

}  // namespace

void lstm_forward(const LstmParams& p) { Forward(p).run(); }

}  // namespace pyops::cpu
