#pragma once

#include <cstdint>
#include <functional>

namespace hata {

// Calls body(begin, end) over disjoint ranges that cover [0, n), each of at least `grain` items
// where there are that many, on torch's intra-op threads (torch.set_num_threads).
// Defined in bindings/parallel.cpp, so that the kernels need no torch.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace hata
