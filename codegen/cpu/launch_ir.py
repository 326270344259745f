"""LLVM IR of the parallel launch; ``launch.py`` compiles it, says what it does, and calls it.

Exports ``run_steps(ptr steps, i64 count, i32 threads)``, ``run_kernel(ptr fn, ptr args, i32 x, i32 y, i32 z,
i32 threads)``, ``run_record(ptr record, i32 threads)``, and two variables: ``parallel``, address of ``GOMP_parallel``
or null, and ``thread_limit``.
"""

# %job lives on the stack of the launching thread: the step, its total, the chunk asked for or 0, the number of parts
# that what is left is thought divided into, and 128 bytes further on, alone on its cache lines, the counter of programs
# handed out.
LAUNCH_IR = """%step = type { ptr, ptr, i32, i32, i32, i32, i64 }
%job = type { ptr, ptr, i32, i32, i32, i32, i64, i64, i64, [72 x i8], i64, [120 x i8] }

@parallel = global ptr null
@thread_limit = global i32 2147483647

define internal void @work(ptr %job) {
entry:
  %fn = load ptr, ptr %job
  %args.at = getelementptr %job, ptr %job, i32 0, i32 1
  %args = load ptr, ptr %args.at
  %x.at = getelementptr %job, ptr %job, i32 0, i32 2
  %x = load i32, ptr %x.at
  %y.at = getelementptr %job, ptr %job, i32 0, i32 3
  %y = load i32, ptr %y.at
  %z.at = getelementptr %job, ptr %job, i32 0, i32 4
  %z = load i32, ptr %z.at
  %total.at = getelementptr %job, ptr %job, i32 0, i32 6
  %total = load i64, ptr %total.at
  %chunk.at = getelementptr %job, ptr %job, i32 0, i32 7
  %given = load i64, ptr %chunk.at
  %is.given = icmp sgt i64 %given, 0
  %parts.at = getelementptr %job, ptr %job, i32 0, i32 8
  %parts = load i64, ptr %parts.at
  %next = getelementptr %job, ptr %job, i32 0, i32 10
  br label %look
look:
  %seen = load atomic i64, ptr %next monotonic, align 8
  br label %take
take:
  %first = phi i64 [ %seen, %look ], [ %now, %claim ]
  %some = icmp slt i64 %first, %total
  br i1 %some, label %claim, label %done
claim:
  %left = sub i64 %total, %first
  %part = udiv i64 %left, %parts
  %share = select i1 %is.given, i64 %given, i64 %part
  %least = call i64 @llvm.smax.i64(i64 %share, i64 1)
  %count = call i64 @llvm.smin.i64(i64 %least, i64 %left)
  %last = add i64 %first, %count
  %swap = cmpxchg weak ptr %next, i64 %first, i64 %last monotonic monotonic
  %now = extractvalue { i64, i1 } %swap, 0
  %mine = extractvalue { i64, i1 } %swap, 1
  br i1 %mine, label %run, label %take
run:
  call void %fn(ptr %args, i32 %x, i32 %y, i32 %z, i64 %first, i64 %last)
  br label %look
done:
  ret void
}

define internal void @run_step(ptr %fn, ptr %args, i32 %x, i32 %y, i32 %z, i32 %flags, i64 %given, i32 %asked) {
entry:
  %job = alloca %job, align 128
  %x64 = sext i32 %x to i64
  %y64 = sext i32 %y to i64
  %z64 = sext i32 %z to i64
  %xy = mul i64 %x64, %y64
  %total = mul i64 %xy, %z64
  %none = icmp sle i64 %total, 0
  br i1 %none, label %done, label %some
some:
  %pool = load ptr, ptr @parallel
  %no.pool = icmp eq ptr %pool, null
  %limit = load i32, ptr @thread_limit
  %threads = call i32 @llvm.smin.i32(i32 %asked, i32 %limit)
  %one.thread = icmp sle i32 %threads, 1
  %one.program = icmp eq i64 %total, 1
  %serial.bit = and i32 %flags, 1
  %serial.flag = icmp ne i32 %serial.bit, 0
  %s1 = or i1 %no.pool, %one.thread
  %s2 = or i1 %one.program, %serial.flag
  %serial = or i1 %s1, %s2
  br i1 %serial, label %direct, label %share
direct:
  tail call void %fn(ptr %args, i32 %x, i32 %y, i32 %z, i64 0, i64 %total)
  br label %done
share:
  %threads64 = zext i32 %threads to i64
  %parts = mul i64 %threads64, 8
  store ptr %fn, ptr %job
  %args.at = getelementptr %job, ptr %job, i32 0, i32 1
  store ptr %args, ptr %args.at
  %x.at = getelementptr %job, ptr %job, i32 0, i32 2
  store i32 %x, ptr %x.at
  %y.at = getelementptr %job, ptr %job, i32 0, i32 3
  store i32 %y, ptr %y.at
  %z.at = getelementptr %job, ptr %job, i32 0, i32 4
  store i32 %z, ptr %z.at
  %total.at = getelementptr %job, ptr %job, i32 0, i32 6
  store i64 %total, ptr %total.at
  %chunk.at = getelementptr %job, ptr %job, i32 0, i32 7
  store i64 %given, ptr %chunk.at
  %parts.at = getelementptr %job, ptr %job, i32 0, i32 8
  store i64 %parts, ptr %parts.at
  %next = getelementptr %job, ptr %job, i32 0, i32 10
  store i64 0, ptr %next
  call void %pool(ptr @work, ptr %job, i32 %threads, i32 0)
  br label %done
done:
  ret void
}

define void @run_steps(ptr %steps, i64 %count, i32 %threads) {
entry:
  %empty = icmp sle i64 %count, 0
  br i1 %empty, label %done, label %loop
loop:
  %i = phi i64 [ 0, %entry ], [ %next, %loop ]
  %step = getelementptr %step, ptr %steps, i64 %i
  %fn = load ptr, ptr %step
  %args.at = getelementptr %step, ptr %step, i32 0, i32 1
  %args = load ptr, ptr %args.at
  %x.at = getelementptr %step, ptr %step, i32 0, i32 2
  %x = load i32, ptr %x.at
  %y.at = getelementptr %step, ptr %step, i32 0, i32 3
  %y = load i32, ptr %y.at
  %z.at = getelementptr %step, ptr %step, i32 0, i32 4
  %z = load i32, ptr %z.at
  %flags.at = getelementptr %step, ptr %step, i32 0, i32 5
  %flags = load i32, ptr %flags.at
  %chunk.at = getelementptr %step, ptr %step, i32 0, i32 6
  %chunk = load i64, ptr %chunk.at
  call void @run_step(ptr %fn, ptr %args, i32 %x, i32 %y, i32 %z, i32 %flags, i64 %chunk, i32 %threads)
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %count
  br i1 %more, label %loop, label %done
done:
  ret void
}

define void @run_kernel(ptr %fn, ptr %args, i32 %x, i32 %y, i32 %z, i32 %threads) {
  call void @run_step(ptr %fn, ptr %args, i32 %x, i32 %y, i32 %z, i32 0, i64 0, i32 %threads)
  ret void
}

define void @run_record(ptr %record, i32 %threads) {
  %fn = load ptr, ptr %record
  %x.at = getelementptr %step, ptr %record, i32 0, i32 2
  %x = load i32, ptr %x.at
  %y.at = getelementptr %step, ptr %record, i32 0, i32 3
  %y = load i32, ptr %y.at
  %z.at = getelementptr %step, ptr %record, i32 0, i32 4
  %z = load i32, ptr %z.at
  %slots = getelementptr %step, ptr %record, i32 1
  call void @run_step(ptr %fn, ptr %slots, i32 %x, i32 %y, i32 %z, i32 0, i64 0, i32 %threads)
  ret void
}

declare i64 @llvm.smin.i64(i64, i64)
declare i64 @llvm.smax.i64(i64, i64)
declare i32 @llvm.smin.i32(i32, i32)
"""
