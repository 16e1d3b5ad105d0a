// The tasks of the drivers on plain threads: what csrc/cpu/parallel.cpp does on torch's pool.
#include <atomic>
#include <thread>
#include <vector>

#include "../cpu/denormals.h"
#include "../cpu/parallel.h"

namespace pyprune {
namespace {

int64_t threads_to_use = 3;
thread_local bool inside = false;

}  // namespace

int64_t thread_count() {
  return threads_to_use;
}

void set_thread_count(int64_t count) {
  threads_to_use = count;
}

void share_tasks(int64_t count, int64_t elements, const std::function<void(int64_t task, int64_t worker)>& body) {
  const int64_t together = tasks_at_a_time(count, elements);
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t worker) {
    const KeepDenormals exact;
    for (int64_t first = next.fetch_add(together); first < count; first = next.fetch_add(together)) {
      for (int64_t task = first; task < std::min(count, first + together); ++task) {
        body(task, worker);
      }
    }
  };
  if (count <= together || inside || threads_to_use == 1) {
    return work(0);
  }
  std::vector<std::thread> threads;
  for (int64_t worker = 0; worker < threads_to_use; ++worker) {
    threads.emplace_back([&work, worker] {
      inside = true;
      work(worker);
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

}  // namespace pyprune
