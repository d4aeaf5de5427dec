# The guest of the chaos tests: a program without a system, which the firmware boots from the first disk.
#
# Nine times a second it reads the table of heads from the disk, looks for the record with the highest sequence, and
# writes its own next one: first into its own head, then into its own log. The layout is told in records.py, and the
# names in capitals come from there (guest.py defines them). Its owner is the text of the fw_cfg file `opt/owner`
# (https://www.qemu.org/docs/master/specs/fw_cfg.html).
#
# All I/O is the firmware's (INT 13h, AH=42h and 43h): nothing is cached here, one request at a time, each write has
# reached the disk when the call returns. It never writes again after an error.
#
# Power button: bit 8 of ACPI's PM1 registers, which the firmware puts at port 0x600; 0x2000 in the control register
# is the state S5, off (ACPI specification, 4.8.3).

.code16
.intel_syntax noprefix

.equ TICKS, 0x46c               # of the BIOS's clock, 18.2 a second
.equ DAY, 0x1800b0              # ticks, then it begins with 0 again
.equ TABLE, 0x2000              # segment: the heads as last read

.text
start:
    cli
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7c00
    sti
    cld
    mov si, offset load_rest
    call read
    mov eax, [TICKS]
    mov [began], eax
    mov dx, 0x602               # the power button may be heard
    mov ax, 0x100
    out dx, ax
    jmp main

# --- disk: SI is the packet that says what ---

read:
    mov ah, 0x42
    jmp 1f
write:
    mov ax, 0x4300
1:
    mov dl, 0x80
    int 0x13
    jc failed
    ret

failed:
    mov si, offset said_error
    jmp last_words

load_rest:
    .byte 16, 0
    .word PROGRAM_SECTORS - 1, 0x7e00, 0
    .quad 1

# --- the end ---

last_words:                     # SI: what to say; then nothing but the power button
    call say
1:  sti
    hlt
    call look_at_button
    jmp 1b

look_at_button:
    mov dx, 0x600
    in ax, dx
    test ah, 1
    jz 1f
    mov si, offset said_off
    call say
    mov dx, 0x604
    mov ax, 0x2000
    out dx, ax
2:  hlt
    jmp 2b
1:  ret

say:                            # SI: text on the serial port
    lodsb
    test al, al
    jz 2f
    mov ah, al
    mov dx, 0x3fd
1:  in al, dx
    test al, 0x20
    jz 1b
    mov al, ah
    mov dx, 0x3f8
    out dx, al
    jmp say
2:  ret

said_error: .asciz "\r\nCHAOS I/O error: it writes no more\r\n"
said_off:   .asciz "\r\nCHAOS power button\r\n"

    .org 510
    .word 0xaa55

# --- the rest, from sector 1 on ---

main:
    call find_owner
    mov si, offset said_owner
    call say
    mov si, offset owner
    call say
    mov si, offset said_end
    call say

claim:                          # take a free slot; whose place in the table begins the search is the owner's
    mov si, offset read_table
    call read
    xor bx, bx
    xor ax, ax
    mov si, offset owner
    mov cx, OWNER_SIZE
1:  lodsb
    add bx, ax
    loop 1b
    mov ax, bx
    xor dx, dx
    mov bx, SLOTS
    div bx
    mov cx, SLOTS               # DX: the slot
2:  mov bx, dx
    shl bx, 9
    mov ax, TABLE
    mov es, ax
    cmp dword ptr es:[bx], 0
    je 3f
    inc dx
    cmp dx, SLOTS
    jb 4f
    xor dx, dx
4:  loop 2b
    mov si, offset said_full
    jmp last_words
3:  movzx eax, dx
    add eax, TABLE_SECTOR
    mov [head_sector], eax
    movzx eax, dx
    inc eax
    imul eax, eax, REGION_SECTORS
    mov [log_sector], eax
    mov dword ptr [index], 0

step:
    mov ebx, [TICKS]
1:  sti
    hlt
    call look_at_button
    mov eax, [TICKS]
    sub eax, ebx
    cmp eax, PAUSE_TICKS
    jb 1b

    mov si, offset read_table
    call read
    mov ax, TABLE
    mov es, ax
    xor bx, bx
    xor eax, eax                # the highest sequence
    mov cx, SLOTS
2:  cmp dword ptr es:[bx], MAGIC
    jne 3f
    mov edx, es:[bx + SEQUENCE_AT]
    cmp edx, eax
    jbe 3f
    mov eax, edx
    mov bp, bx                  # its place
3:  add bx, 512
    loop 2b

    # The record, in the head's sector.
    push ds
    pop es
    mov dword ptr [head + PREVIOUS_AT], eax
    mov di, offset head + PREVIOUS_OWNER_AT
    mov cx, OWNER_SIZE
    test eax, eax
    jz 4f
    mov si, bp
    add si, OWNER_AT
    mov dx, TABLE
    mov ds, dx
    rep movsb
    push es
    pop ds
4:  inc eax
    mov dword ptr [head + SEQUENCE_AT], eax
    mov dword ptr [head], MAGIC
    mov si, offset owner
    mov di, offset head + OWNER_AT
    mov cx, OWNER_SIZE
    rep movsb
    mov eax, [TICKS]
    sub eax, [began]
    jnc 5f
    add eax, DAY
5:  mov dword ptr [head + UPTIME_AT], eax
    mov eax, [index]
    mov dword ptr [head + INDEX_AT], eax

    # The log's sector holds some records, and is empty before the first of them.
    and ax, RECORDS_PER_SECTOR - 1
    jnz 6f
    mov di, offset log
    mov cx, 512
    push ax
    xor ax, ax
    rep stosb
    pop ax
6:  imul di, ax, RECORD_SIZE
    add di, offset log
    mov si, offset head
    mov cx, RECORD_SIZE
    rep movsb

    mov si, offset write_head
    call write
    mov si, offset write_log
    call write

    inc dword ptr [index]
    mov eax, [index]
    test al, RECORDS_PER_SECTOR - 1
    jnz step
    inc dword ptr [log_sector]
    cmp eax, LOG_RECORDS
    jb step
    jmp claim                   # its log is full: it takes another slot, too

find_owner:                     # the file's size and selector are big-endian
    mov dx, 0x510
    mov ax, 0x19                # the directory
    out dx, ax
    inc dx
    in al, dx
    in al, dx
    in al, dx
    mov ch, al
    in al, dx
    mov cl, al
1:  push cx
    mov di, offset entry
    mov cx, 64
    rep insb
    mov si, offset owner_name
    mov di, offset entry + 8
    mov cx, owner_name_end - owner_name
    repe cmpsb
    pop cx
    je 2f
    loop 1b
    mov si, offset said_nobody
    jmp last_words
2:  mov ax, [entry + 4]
    xchg al, ah
    dec dx
    out dx, ax
    inc dx
    mov cx, [entry + 2]
    xchg cl, ch
    cmp cx, OWNER_SIZE - 1
    jbe 3f
    mov cx, OWNER_SIZE - 1
3:  mov di, offset owner
    rep insb
    ret

owner_name: .asciz "opt/owner"
owner_name_end:
said_owner: .asciz "\r\nCHAOS owner "
said_end:   .asciz "\r\n"
said_full:  .asciz "\r\nCHAOS every slot of the table is taken: it writes nothing\r\n"
said_nobody: .asciz "\r\nCHAOS no fw_cfg file opt/owner: it writes nothing\r\n"

    .balign 4
read_table:
    .byte 16, 0
    .word SLOTS, 0, TABLE
    .quad TABLE_SECTOR
write_head:
    .byte 16, 0
    .word 1, head, 0
head_sector:
    .quad 0
write_log:
    .byte 16, 0
    .word 1, log, 0
log_sector:
    .quad 0
began:  .long 0
index:  .long 0
entry:  .fill 64
owner:  .fill OWNER_SIZE

    .balign 512
head:   .fill 512
log:    .fill 512
    .org PROGRAM_SECTORS * 512
