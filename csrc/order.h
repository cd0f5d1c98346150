/* SPDX-License-Identifier: Apache-2.0
 *
 * The natural order of tensor names: "layers.2." before "layers.10.", as people and some loaders
 * have it. Pure. Only for guessing what is asked for next: nothing but speed depends on it.
 */
#ifndef STX_ORDER_H
#define STX_ORDER_H

#include <stdint.h>

#include "header.h"

/* Fill `order` (tensors_count indexes) so that the names ascend: runs of digits count as numbers, a
 * dot comes before everything else. */
void stx_order_naturally(const struct stx_header *header, uint32_t *order);

#endif
