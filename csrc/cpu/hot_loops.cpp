#include "cpu/hot_loops.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace hata {

// Defined in hot_loops_<instruction set>.cpp.
extern const HotLoops kScalarLoops;
#if defined(__x86_64__)
extern const HotLoops kAvx2Loops;
extern const HotLoops kAvx512Loops;
#endif

namespace {

struct InstructionSet {
  std::string_view name;
  const HotLoops* loops;
  bool supported;
};

const HotLoops& choose() {
  const InstructionSet sets[] = {
      // From worst to best.
      {"scalar", &kScalarLoops, true},
#if defined(__x86_64__)
      {"avx2", &kAvx2Loops,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c")},
      {"avx512", &kAvx512Loops,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vpopcntdq") &&
           __builtin_cpu_supports("avx512vnni")},
#endif
  };
  const char* wanted = std::getenv("HATA_CPU_ISA");
  const HotLoops* best = nullptr;
  std::string supported;
  for (const auto& [name, loops, is_supported] : sets) {
    if (!is_supported) continue;
    if (wanted != nullptr && name == wanted) return *loops;
    supported += supported.empty() ? "" : ", ";
    supported += name;
    best = loops;
  }
  if (wanted != nullptr && *wanted != '\0') {
    throw std::runtime_error("hata: HATA_CPU_ISA must be one of " + supported +
                             " on this CPU, got " + wanted);
  }
  return *best;
}

}  // namespace

const HotLoops& hot_loops() {
  static const HotLoops& loops = choose();
  return loops;
}

}  // namespace hata
