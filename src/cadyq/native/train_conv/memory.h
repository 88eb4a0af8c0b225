// Large arrays for results: on huge pages where the system has them, and kept for the next step instead of given back.
#pragma once
#include <cstddef>

namespace cadyq {

// Uninitialised memory, aligned to 2 MiB; null when it cannot be had. Free it with block_free.
void* block_alloc(size_t bytes);
void block_free(void* block);
// Gives idle blocks back to the system.
void block_release();

}  // namespace cadyq
