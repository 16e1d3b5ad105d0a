// Threads for the CPU drivers. One implementation hands tasks to torch's own pool; torch-free programs bring another.
#pragma once

#include <cstdint>
#include <functional>

namespace pyprune {

int64_t thread_count();

// Runs body(worker) once for each worker in [0, thread_count()), on several threads at once; in a task that already
// runs in parallel they run one after the other.
void run_workers(const std::function<void(int64_t worker)>& body);

// Shares tasks 0..count-1 among the workers, next one to whoever is free.
void share_tasks(int64_t count, const std::function<void(int64_t task, int64_t worker)>& body);

}  // namespace pyprune
