#include "chains.h"

#include <algorithm>
#include <thread>

#include "runtime.h"

namespace pyops::cpu {
namespace {

constexpr int kPatience = 4000;  // looks at its own chains before a waiting thread helps others

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

int64_t Chains::add(int64_t tasks, int64_t worker) {
  if (worker >= workers()) by_worker_.resize(worker + 1);
  by_worker_[worker].push_back(static_cast<int64_t>(chains_.size()));
  chains_.push_back({tasks, {}});
  return static_cast<int64_t>(chains_.size()) - 1;
}

bool Chains::ready(int64_t chain, int64_t task) const {
  for (const Need& need : chains_[chain].needs) {
    for (int64_t other = need.first; other < need.first + need.count; ++other) {
      const int64_t enough = std::min(task + need.lead, chains_[other].tasks);
      if (states_[other].done.load(std::memory_order_acquire) < enough) return false;
    }
  }
  return true;
}

// Runs the chain's next task if it can start; false if not.
bool Chains::advance(int64_t chain) {
  State& state = states_[chain];
  int64_t task = state.done.load(std::memory_order_acquire);
  if (task == chains_[chain].tasks || !ready(chain, task)) return false;
  if (state.taken.exchange(true, std::memory_order_acquire)) return false;
  task = state.done.load(std::memory_order_acquire);  // another thread may have run it meanwhile
  const bool go = task < chains_[chain].tasks && ready(chain, task);
  if (go) {
    run_(context_, chain, task);
    state.done.store(task + 1, std::memory_order_release);
  }
  state.taken.store(false, std::memory_order_release);
  return go;
}

void Chains::work(int64_t worker) {
  const std::vector<int64_t>& own = by_worker_[worker];
  int patience = kPatience;
  for (int looks = 0;;) {
    bool moved = false, finished = true;
    for (const int64_t chain : own) {
      moved |= advance(chain);
      finished =
          finished && states_[chain].done.load(std::memory_order_acquire) == chains_[chain].tasks;
    }
    if (finished) return;
    if (moved) {
      looks = 0;
      continue;
    }
    pause();
    if (++looks < patience) continue;
    looks = 0;
    std::this_thread::yield();
    for (int64_t chain = 0; chain < static_cast<int64_t>(chains_.size()); ++chain) {
      // Others' work left undone: fewer threads run than there are workers.
      if (advance(chain)) patience = std::max(patience / 2, 1);
    }
  }
}

void Chains::run(void (*run)(void*, int64_t, int64_t), void* context) {
  run_ = run;
  context_ = context;
  states_ = std::vector<State>(chains_.size());
  parallel_for(workers(), [&](int64_t worker) { work(worker); });
}

}  // namespace pyops::cpu
