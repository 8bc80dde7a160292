#include "cpu/float_loops.h"
#include "cpu/rank_loops.h"
#include "cpu/scan_loops.h"

namespace hata {

extern const HotLoops kScalarLoops;
const HotLoops kScalarLoops = {
    .count_matches = count_matches,
    .apply_norms = apply_norms,
    .to_float = to_float,
    .sum_squares = sum_squares,
    .project = project,
    .dot_rows = dot_rows,
    .add_weighted_rows = add_weighted_rows,
    .ranks16 = kRankLoops<uint16_t>,
    .ranks32 = kRankLoops<uint32_t>,
};

}  // namespace hata
