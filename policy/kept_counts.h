// How many heads and channels a prune ratio leaves, by the rule of Probe Pruning (arXiv 2502.15618
// and its code): layers that bear pruning least stay whole, and the others make up for them.
#pragma once

namespace espalier {

// `ratio` of L layers of which `dense` stay whole, for each of the others: L / (L - dense) * ratio,
// rounded to two digits, half to even. `ratio` in [0, 1], 0 <= dense < L.
double NarrowedLayerRatio(int layers, int dense, double ratio);

// Heads kept of `heads` at a layer's ratio: what is pruned is cut to a whole number.
int KeptHeads(int heads, double layer_ratio);

// Channels kept of `channels`, rounded up to a multiple of `multiple`, and all at most.
int KeptChannels(int channels, double layer_ratio, int multiple);

}  // namespace espalier
