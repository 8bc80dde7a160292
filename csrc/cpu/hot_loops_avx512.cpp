#include "cpu/float_loops.h"
#include "cpu/key_loops.h"
#include "cpu/scan_loops.h"

namespace hata {

extern const HotLoops kAvx512Loops;
const HotLoops kAvx512Loops = {
    .count_matches = count_matches,
    .apply_norms = apply_norms,
    .to_float = to_float,
    .sum_squares = sum_squares,
    .project = project,
    .dot_rows = dot_rows,
    .add_weighted_rows = add_weighted_rows,
    .keys16 = kKeyLoops<uint16_t>,
    .keys32 = kKeyLoops<uint32_t>,
};

}  // namespace hata
