#include "engine/scheduling/batch.h"

namespace espalier {

void Batch::Clear() {
  tokens.clear();
  spans.clear();
  logits.clear();
  decode_rows = 0;
  prefill_rows = 0;
}

}  // namespace espalier
