// Threads for the CPU drivers. One implementation hands tasks to torch's own pool; torch-free programs bring another.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace pyprune {

int64_t thread_count();

// Shares tasks 0..count-1 among the workers 0..thread_count()-1, the next few to whoever is free. They are `elements`
// of work in all, by which small tasks are taken several at a time, and little work is done by one thread. So is all
// in a task that already runs in parallel.
void share_tasks(int64_t count, int64_t elements, const std::function<void(int64_t task, int64_t worker)>& body);

// How many tasks to take at a time, so that taking them costs nothing beside the work.
constexpr int64_t tasks_at_a_time(int64_t count, int64_t elements) {
  constexpr int64_t kWorthTaking = 32768;
  return elements <= kWorthTaking ? count : std::max<int64_t>(1, count / (elements / kWorthTaking));
}

}  // namespace pyprune
