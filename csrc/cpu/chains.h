// Runs chains of dependent tasks on several threads. Free of torch.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace pyops::cpu {

// A chain is a row of tasks done in order, 0, 1, ... Its next task may start once every chain it
// needs has done enough. Each chain belongs to a worker, so that a thread finds its data
// in its own cache; a thread that waits too long runs any chain that can go on, so that the work
// ends however many threads there really are.
class Chains {
 public:
  struct Need {
    int64_t first, count;  // chains
    // Tasks that must be done before task `task`: task + lead, at most all.
    int64_t lead;
  };

  int64_t add(int64_t tasks, int64_t worker);  // gives the chain's number
  void need(int64_t chain, Need need) { chains_[chain].needs.push_back(need); }
  int64_t workers() const { return static_cast<int64_t>(by_worker_.size()); }

  // Calls run(context, chain, task) for every task. `run` must not throw.
  void run(void (*run)(void* context, int64_t chain, int64_t task), void* context);

  template <class F>
  void run(const F& f) {
    run([](void* context, int64_t chain,
           int64_t task) { (*static_cast<const F*>(context))(chain, task); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }

 private:
  struct Chain {
    int64_t tasks;
    std::vector<Need> needs;
  };
  struct alignas(64) State {
    std::atomic<int64_t> done{0};
    std::atomic<bool> taken{false};
  };

  bool ready(int64_t chain, int64_t task) const;
  void work(int64_t worker);
  bool advance(int64_t chain);

  std::vector<Chain> chains_;
  std::vector<std::vector<int64_t>> by_worker_;
  std::vector<State> states_;
  void (*run_)(void*, int64_t, int64_t) = nullptr;
  void* context_ = nullptr;
};

}  // namespace pyops::cpu
