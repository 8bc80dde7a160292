#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace hata {

// Defined in hot_loops_<instruction set>.cpp.
extern const HotLoops kScalarLoops;
#if defined(__x86_64__)
extern const HotLoops kAvx2Loops;
extern const HotLoops kAvx512Loops;
#endif

namespace {

struct Isa {
  std::string_view name;
  const HotLoops* loops;
};

std::vector<Isa> supported() {
  std::vector<Isa> isas = {{"scalar", &kScalarLoops}};
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vpopcntdq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx2) isas.push_back({"avx2", &kAvx2Loops});
  if (avx2 && avx512) isas.push_back({"avx512", &kAvx512Loops});
#endif
  return isas;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : supported()) names.emplace_back(isa.name);
  return names;
}

const HotLoops& loops_of_isa(std::string_view name) {
  std::string names;
  for (const Isa& isa : supported()) {
    if (isa.name == name) return *isa.loops;
    names += names.empty() ? "" : ", ";
    names += isa.name;
  }
  throw std::runtime_error("hata: HATA_CPU_ISA must be one of " + names + " on this CPU, got " +
                           std::string(name));
}

const HotLoops& hot_loops() {
  static const HotLoops& loops = []() -> const HotLoops& {
    const char* wanted = std::getenv("HATA_CPU_ISA");
    return wanted != nullptr && *wanted != '\0' ? loops_of_isa(wanted) : *supported().back().loops;
  }();
  return loops;
}

}  // namespace hata
