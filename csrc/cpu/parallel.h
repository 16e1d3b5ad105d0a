// Threads for the CPU drivers. One implementation hands tasks to torch's own pool; torch-free programs bring another.
#pragma once

#include <cstdint>
#include <functional>

namespace pyprune {

int64_t thread_count();

// Shares tasks 0..count-1 among the workers 0..thread_count()-1, next one to whoever is free. In a task that already
// runs in parallel, one thread does them all.
void share_tasks(int64_t count, const std::function<void(int64_t task, int64_t worker)>& body);

}  // namespace pyprune
