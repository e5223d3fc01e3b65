// Runs the LSTM's backward pass, layer by layer from the top.
#include <algorithm>
#include <vector>

#include "arena.h"
#include "chains.h"
#include "lstm_grad_plan.h"
#include "runtime.h"

namespace pyops::cpu {
namespace {

constexpr int64_t kChunkSteps = 8;  // of a task, where no other chain waits

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Backward {
 public:
  explicit Backward(const LstmGradParams& g) {
    static_cast<LstmBlocks&>(plan_) = lstm_blocks(g.p);
    plan_.g = g;
    groups_ = lstm_groups(g.p, plan_, 4 * plan_.lanes);
    groups_.units *= groups_.layers;  // layers run one after another here
    plan_.hidden_columns = columns(g.p.hidden_size);
    groups_.units = std::min(groups_.units, plan_.hidden_columns.blocks);
    make_chains();
    threads_ = groups_.rows * groups_.units * g.p.directions == 1 ? 1 : num_threads();
    Arena counted;
    for (int64_t layer = 0; layer < g.p.layers; ++layer) {
      Arena one;
      set_layer(layer, &one);
      bytes_ = std::max(bytes_, one.used());
    }
    lay_out_between(&counted);
    base_ = static_cast<char*>(scratch(0, bytes_ + counted.used()));
    Arena between(base_ + bytes_);
    lay_out_between(&between);
  }

  void run() {
    const SingleThread scope(threads_ == 1);
    for (int64_t layer = plan_.g.p.layers; layer-- > 0;) {
      Arena arena(base_);
      set_layer(layer, &arena);
      run_layer();
    }
  }

 private:
  // Narrow blocks waste less of the last one and cost more loads.
  LstmColumns columns(int64_t count) const {
    LstmColumns best{};
    double least = 0;
    for (const int64_t vectors : {4, 2, 1}) {
      const int64_t blocks = ceil_div(count, vectors * plan_.lanes);
      const double cost = blocks * vectors * (vectors == 4 ? 1.0 : vectors == 2 ? 1.05 : 1.25);
      if (best.blocks == 0 || cost < least) {
        best = {count, vectors, blocks};
        least = cost;
      }
    }
    return best;
  }

  void make_chains() {
    const LstmParams& p = plan_.g.p;
    const std::vector<int64_t> bounds = lstm_row_bounds(p, groups_.rows);
    const int64_t all = plan_.hidden_columns.blocks;
    const int64_t width = plan_.column_floats(plan_.hidden_columns);
    const auto block_of = [&](int64_t column) {
      return column == all ? plan_.blocks : std::min(plan_.blocks, column * width / plan_.units);
    };
    for (int64_t d = 0; d < p.directions; ++d) {
      for (int64_t r = 0; r < groups_.rows; ++r) {
        for (int64_t u = 0; u < groups_.units; ++u) {
          const int64_t begin = all * u / groups_.units, end = all * (u + 1) / groups_.units;
          chains_.push_back(
              {d, bounds[r], bounds[r + 1], block_of(begin), block_of(end), begin, end});
        }
      }
    }
  }

  // Gradients between the layers, of which at most two live at a time.
  void lay_out_between(Arena* arena) {
    const LstmParams& p = plan_.g.p;
    const int64_t bytes = p.rows * p.directions * p.hidden_size * element_size(p.dtype);
    for (int64_t i = 0; i < 2; ++i) between_[i] = arena->take<char>(p.layers > 1 + i ? bytes : 0);
  }

  void set_layer(int64_t layer, Arena* arena) {
    const LstmParams& p = plan_.g.p;
    const int64_t features = p.directions * p.hidden_size, bytes = element_size(p.dtype);
    const auto rows_of = [&](void* data) {
      return LstmSequence{data, p.batch * features, features};
    };
    const auto hidden = [&](int64_t l) {
      return rows_of(static_cast<char*>(p.saved) + p.saved_output(l) * bytes);
    };
    plan_.layer = layer;
    plan_.in = layer ? hidden(layer - 1) : p.input;
    plan_.out = layer + 1 < p.layers ? hidden(layer) : p.output;
    plan_.grad_out = layer + 1 < p.layers ? rows_of(between_[layer % 2]) : plan_.g.grad_output;
    plan_.grad_in = layer ? rows_of(between_[(layer + 1) % 2]) : plan_.g.grad_input;
    plan_.in_columns = columns(plan_.in_features());
    const bool wants_input = layer > 0 || plan_.g.grad_input.data;

    directions_.clear();
    tasks_.clear();
    const int64_t words = plan_.gate_words();
    const auto packed = [&](const LstmColumns& c) {
      return arena->take<float>(c.blocks * words * plan_.column_floats(c));
    };
    for (int64_t d = 0; d < p.directions; ++d) {
      LstmGradScratch s;
      s.recurrent = packed(plan_.hidden_columns);
      s.input = wants_input ? packed(plan_.in_columns) : nullptr;
      s.gates = arena->take<char>(p.rows * words * 4);
      s.hidden = arena->take<float>(p.batch * plan_.hidden_columns.blocks *
                                    plan_.column_floats(plan_.hidden_columns));
      s.cell = arena->take<float>(p.batch * plan_.padded_hidden());
      s.totals =
          plan_.g.grad_weights
              ? arena->take<float>(plan_.blocks * plan_.weight_columns() * plan_.block_floats())
              : nullptr;
      directions_.push_back(s);
    }
    plan_.directions = directions_.data();
    if (plan_.g.grad_weights) make_weight_tasks(arena);
  }

  void make_weight_tasks(Arena* arena) {
    const LstmParams& p = plan_.g.p;
    const int64_t share = std::max<int64_t>(1, threads_ / p.directions);
    const int64_t block_parts = std::min(share, plan_.blocks), all = plan_.weight_columns();
    const int64_t column_parts = std::min(share / block_parts, std::max<int64_t>(1, all / 24));
    for (int64_t part = 0; part < p.directions * block_parts * column_parts; ++part) {
      const int64_t b = part % block_parts, c = part / block_parts % column_parts;
      LstmWeightTask task;
      task.direction = part / block_parts / column_parts;
      task.block_begin = plan_.blocks * b / block_parts;
      task.block_end = plan_.blocks * (b + 1) / block_parts;
      task.column_begin = all * c / column_parts;
      task.column_end = all * (c + 1) / column_parts;
      task.gathered = arena->take<float>(kLstmRowsPerSum * (task.column_end - task.column_begin));
      tasks_.push_back(task);
    }
  }

  void run_layer() const {
    const LstmParams& p = plan_.g.p;
    const int64_t column_blocks =
        plan_.hidden_columns.blocks + (plan_.grad_in.data ? plan_.in_columns.blocks : 0);
    const auto prepare = PYOPS_ISA_SELECT(lstm_grad_prepare);
    parallel_for(p.directions * column_blocks,
                 [&](int64_t task) { prepare(plan_, task / column_blocks, task % column_blocks); });
    back_through_time();
    if (plan_.grad_in.data) {
      const auto run_rows = PYOPS_ISA_SELECT(lstm_grad_input);
      parallel_for(ceil_div(p.rows, kLstmRowsPerInputTask), [&](int64_t task) {
        const int64_t begin = task * kLstmRowsPerInputTask;
        run_rows(plan_, begin, std::min(begin + kLstmRowsPerInputTask, p.rows));
      });
    }
    const auto run_weights = PYOPS_ISA_SELECT(lstm_grad_weights);
    parallel_for(static_cast<int64_t>(tasks_.size()),
                 [&](int64_t task) { run_weights(plan_, tasks_[task]); });
  }

  void back_through_time() const {
    const int64_t all = plan_.g.p.steps + 1, steps = groups_.units > 1 ? 1 : kChunkSteps;
    const int64_t threads = std::max(1, num_threads());
    Chains work;
    for (int64_t i = 0; i < static_cast<int64_t>(chains_.size()); ++i) {
      const int64_t place = i % (groups_.rows * groups_.units);
      work.add(ceil_div(all, steps),
               (place * plan_.g.p.directions + chains_[i].direction) % threads);
      if (groups_.units > 1) work.need(i, {i - place % groups_.units, groups_.units, 0});
    }
    const auto run_chain = PYOPS_ISA_SELECT(lstm_grad_run);
    work.run([&](int64_t chain, int64_t task) {
      for (int64_t i = task * steps; i < std::min((task + 1) * steps, all); ++i) {
        run_chain(plan_, chains_[chain], i);
      }
    });
  }

  LstmGradPlan plan_{};
  LstmGroups groups_;
  int64_t threads_;
  size_t bytes_ = 0;
  char* base_ = nullptr;
  char* between_[2] = {};
  std::vector<LstmGradChain> chains_;
  std::vector<LstmGradScratch> directions_;
  std::vector<LstmWeightTask> tasks_;
};

}  // namespace

void lstm_backward(const LstmGradParams& g) { Backward(g).run(); }

}  // namespace pyops::cpu
