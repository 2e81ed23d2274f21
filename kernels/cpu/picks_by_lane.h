// Some of sixteen lanes, copied one by one. Included by kernels_*.cc before lanes whose registers
// hold fewer: a permutation across several costs more than it saves.
#pragma once

// Lanes [begin, end) take what lies in from[begin] .. from[end - 1] of another sixteen.
struct Picks {
  const int32_t* from;
  int begin;
  int end;
};

Picks PickLanes(const int32_t* from, int begin, int end) { return {from, begin, end}; }

// to[lane] = source[from[lane]], of 4 and of 2 bytes; lanes that are not picked stay as they are.
void PickWords(const Picks& picks, const uint8_t* source, uint8_t* to) {
  for (int i = picks.begin; i < picks.end; ++i) {
    __builtin_memcpy(to + 4 * i, source + 4 * picks.from[i], 4);
  }
}
void PickHalves(const Picks& picks, const uint8_t* source, uint8_t* to) {
  for (int i = picks.begin; i < picks.end; ++i) {
    __builtin_memcpy(to + 2 * i, source + 2 * picks.from[i], 2);
  }
}
