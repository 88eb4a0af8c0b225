// Threads (those of the OpenMP runtime that torch brings, or our own) and the scratch memory of the kernels.
#pragma once
#include <memory>
#include <mutex>

#include "abi.h"

namespace cadyq {

// Holds the process-wide pool from construction to destruction; other callers wait.
class PoolLease {
 public:
  explicit PoolLease(int n_threads);
  const Runtime& runtime() const { return runtime_; }

 private:
  std::unique_lock<std::mutex> lock_;
  Runtime runtime_;
};

}  // namespace cadyq
