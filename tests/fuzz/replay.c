/* SPDX-License-Identifier: Apache-2.0
 *
 * Runs the fuzzer's target once on each file named on the command line, without libFuzzer: for
 * compilers that lack it, and to look at a finding in a debugger.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int replay(const char *path) {
    static uint8_t bytes[1 << 20];
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        perror(path);
        return 1;
    }
    const size_t size = fread(bytes, 1, sizeof bytes, file);
    (void)fclose(file);
    uint8_t *exact = malloc(size + 1); /* so that a byte too far is seen */
    if (exact == NULL) return 1;
    for (size_t i = 0; i < size; i++) exact[i] = bytes[i];
    (void)LLVMFuzzerTestOneInput(exact, size);
    free(exact);
    return 0;
}

int main(int count, char **paths) {
    int failed = count < 2;
    for (int i = 1; i < count; i++) failed |= replay(paths[i]);
    return failed;
}
