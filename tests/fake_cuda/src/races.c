/* Races between streams: two pieces of work touch the same bytes, one of them writes, and nothing orders them.
 *
 * Whether such a race shows as wrong bytes depends on the schedule; whether it is one does not. So each piece of work is
 * compared, when it is queued, with what touched its memory before. The order is kept in vector clocks: a stream's
 * clock tells, for each stream, up to which of its work everything queued from now on is surely later. Waits join
 * clocks: for an event, for the default stream's rule, and the host's own (synchronising, or a query that says "done").
 *
 * Memory that torch's allocator hands out again is the same memory here, so a missing record_stream is a race as well.
 *
 * Not seen: what the host does with pinned memory (only the copies of it), and order among several host threads, who
 * count as one; both can only hide a race. Rows of a 2-D copy are looked at one by one; the copies of a batch are
 * taken to run in order.
 */
#include "runtime.h"

enum { MOST_TOUCHES = 4096, MOST_RACES = 16 }; /* a block's oldest touches and further races are dropped */

static Clock host; /* what the host knows to be done */
static char races[MOST_RACES][256];
static size_t race_count;

static uint64_t clock_at(const Clock *clock, unsigned stream) {
    return stream < clock->size ? clock->at[stream] : 0;
}

static void widen(Clock *clock, size_t size) {
    if (clock->size >= size) return;
    clock->at = realloc(clock->at, size * sizeof *clock->at);
    if (!clock->at) abort();
    memset(clock->at + clock->size, 0, (size - clock->size) * sizeof *clock->at);
    clock->size = size;
}

void join_clock(Clock *clock, const Clock *other) {
    widen(clock, other->size);
    for (size_t i = 0; i < other->size; i++)
        if (other->at[i] > clock->at[i]) clock->at[i] = other->at[i];
}

void host_knows(const Clock *clock) { join_clock(&host, clock); }

static const char *name_of(const Op *op) {
    if (op->kind == OP_COPY) return copy_kind_names[op->copy_kind];
    return op->kind == OP_SET ? "set" : "free";
}

static void report(const Block *block, const Touch *before, const Touch *now) {
    counters.races++;
    char text[sizeof *races];
    snprintf(text, sizeof text, "stream %u %s (%s) and stream %u %s (%s) the same bytes, %zu into %s memory: neither waits",
             before->stream, before->writes ? "writes" : "reads", before->name, now->stream,
             now->writes ? "writes" : "reads", now->name, (size_t)(now->start - block->start),
             block->kind == DEVICE_MEMORY ? "device" : "pinned");
    trace("RACE: %s", text);
    if (race_count < MOST_RACES) memcpy(races[race_count++], text, sizeof text);
}

static void touch(const Stream *stream, Block *block, Touch now) {
    size_t kept = 0;
    bool raced = false;
    for (size_t i = 0; i < block->touch_count; i++) {
        Touch *before = &block->touches[i];
        bool ordered = clock_at(&stream->clock, before->stream) >= before->position;
        bool overlap = before->start < now.end && now.start < before->end;
        if (overlap && !ordered && !raced && (before->writes || now.writes)) {
            report(block, before, &now);
            raced = true;
        }
        bool covered = now.start <= before->start && before->end <= now.end;
        bool replaced = covered && ordered && (now.writes || (!before->writes && before->stream == now.stream));
        if (replaced || clock_at(&host, before->stream) >= before->position) continue; /* can race no more */
        block->touches[kept++] = *before;
    }
    block->touch_count = kept;
    if (block->touch_count == MOST_TOUCHES)
        memmove(block->touches, block->touches + 1, --block->touch_count * sizeof now);
    if (block->touch_count == block->touch_room) {
        block->touch_room = block->touch_room ? 2 * block->touch_room : 8;
        block->touches = realloc(block->touches, block->touch_room * sizeof now);
        if (!block->touches) abort();
    }
    block->touches[block->touch_count++] = now;
}

void note_work(Stream *stream, const Op *op) {
    join_clock(&stream->clock, &host);
    widen(&stream->clock, stream->number + 1);
    uint64_t position = ++stream->clock.at[stream->number];
    for (int i = 0; i < 2; i++) {
        Block *block = op->blocks[i];
        if (!block) continue;
        Touch now = {.stream = stream->number, .position = position, .writes = i == 0, .name = name_of(op)};
        if (op->kind == OP_RELEASE) {
            now.start = block->start;
            now.end = block->end;
            touch(stream, block, now);
            continue;
        }
        uintptr_t start = (uintptr_t)(i == 0 ? op->target : op->source);
        size_t pitch = i == 0 ? op->target_pitch : op->source_pitch;
        for (size_t row = 0; row < op->height; row++) {
            now.start = start + row * pitch;
            now.end = now.start + op->width;
            touch(stream, block, now);
        }
    }
}

EXPORT size_t fake_cuda_races(char *text, size_t room);

/* One line for each race; returns the length without the final NUL. */
EXPORT size_t fake_cuda_races(char *text, size_t room) {
    size_t length = 0;
    if (room) *text = 0;
    lock_world();
    for (size_t i = 0; i < race_count && length < room; i++)
        length += (size_t)snprintf(text + length, room - length, "%s\n", races[i]);
    unlock_world();
    return length;
}

EXPORT void fake_cuda_forget_races(void) {
    lock_world();
    race_count = 0;
    counters.races = 0;
    unlock_world();
}
