# A guest that is firmware and nothing else: it boots at once, hears the power button, and obeys words on its serial port.
#
# A timer wakes it 18 times a second; then it looks at the button and at what was typed. In between it is halted, so it
# takes no processor time. TAG is what it calls itself. With DEAF it does not hear the button.
#
# It is for the machine q35. Power button: bit 8 of ACPI's PM1 registers, which it puts at port 0x600 as Linux's firmware
# does (Intel, ICH9 datasheet: PMBASE and ACPI_CNTL of the LPC interface); 0x2000 in the control register is the state S5,
# off (ACPI specification, 4.8.3). 6 at port 0xcf9 is a reset (the same datasheet), 1 at port 0x505 tells the device
# pvpanic of a panic (https://www.qemu.org/docs/master/specs/pvpanic.html).

.code16
.intel_syntax noprefix

.equ LINE, 0x500                # what was typed: the end of the line so far
.equ PM1, 0x600

.org 0
start:
    cli
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x7c00
    mov word ptr [8 * 4], offset tick
    mov word ptr [8 * 4 + 2], 0xf000

    lgdt cs:[gdt_pointer]       # the local APIC, beyond a segment's 64 KiB: lets the interrupt controller's through
    mov eax, cr0
    or al, 1
    mov cr0, eax
    mov bx, 8
    mov ds, bx
    and al, 0xfe
    mov cr0, eax
    mov ebx, 0xfee00350
    mov dword ptr [ebx], 0x700
    xor ax, ax
    mov ds, ax
    mov al, 0x11                # interrupt controller: the timer's only, as vector 8
    out 0x20, al
    mov al, 8
    out 0x21, al
    mov al, 4
    out 0x21, al
    mov al, 1
    out 0x21, al
    mov al, 0xfe
    out 0x21, al
    mov eax, 0x8000f840         # PCI 0:1f.0
    mov ebx, PM1 | 1
    call configure
    mov eax, 0x8000f844
    mov ebx, 0x80
    call configure
    mov dx, PM1 + 2             # the power button may be heard
    mov ax, 0x100
    out dx, ax
    mov dx, 0x3fa               # the serial port keeps 16 bytes of what is typed
    mov al, 1
    out dx, al
    mov byte ptr [LINE], 0

    mov si, offset said_hello
    call say
    mov si, offset tag
    call say

wait:
    sti
    hlt
.ifndef DEAF
    cmp byte ptr [LINE + 2], 1
    je typed
    mov dx, PM1
    in ax, dx
    test ah, 1
    jz typed
    mov si, offset said_button
    jmp power_off
.endif
typed:
    mov dx, 0x3fd
    in al, dx
    test al, 1
    jz wait
    mov dx, 0x3f8
    in al, dx
    cmp al, '\r'                # a terminal in raw mode sends that for Enter
    je obey
    cmp al, '\n'
    je obey
    mov ah, [LINE]              # the last two letters tell the words from each other
    mov [LINE + 1], ah
    mov [LINE], al
    call put
    jmp typed

obey:
    mov si, offset new_line
    call say
    mov ax, [LINE]
    cmp ax, ('f' << 8) | 'f'    # poweroff
    mov si, offset said_off
    je power_off
    cmp ax, ('o' << 8) | 't'    # reboot
    je reboot
    cmp ax, ('i' << 8) | 'c'    # panic
    je panic
    cmp ax, ('l' << 8) | 'p'    # help
    mov si, offset said_help
    je 1f
    cmp ax, ('a' << 8) | 'f'    # deaf
    mov si, offset said_no
    jne 1f
    mov byte ptr [LINE + 2], 1
    mov si, offset said_deaf
1:  call say
    jmp typed

reboot:
    mov dx, 0xcf9
    mov al, 6
    out dx, al
    jmp stand

panic:                          # the device pvpanic, if there is one
    mov dx, 0x505
    mov al, 1
    out dx, al
    jmp stand

power_off:
    call say
    mov si, offset said_goodbye
    call say
    mov si, offset tag
    call say
    mov dx, PM1 + 4
    mov ax, 0x2000
    out dx, ax
stand:
    cli
    hlt
    jmp stand

configure:                      # EAX: which register of PCI, EBX: its value
    mov dx, 0xcf8
    out dx, eax
    mov dx, 0xcfc
    mov eax, ebx
    out dx, eax
    ret

say:                            # SI: text for the serial port
    mov al, cs:[si]
    inc si
    test al, al
    jz 1f
    call put
    jmp say
1:  ret

put:                            # AL: a character for the serial port
    mov ah, al
    mov dx, 0x3fd
1:  in al, dx
    test al, 0x20
    jz 1b
    mov al, ah
    mov dx, 0x3f8
    out dx, al
    ret

tick:
    push ax
    mov al, 0x20
    out 0x20, al
    pop ax
    iret

gdt:            .quad 0, 0x00cf92000000ffff
gdt_pointer:    .word 15
                .long 0xf0000 + gdt
new_line:       .asciz "\r\n"
tag:            .asciz "TAG\r\n"
said_hello:     .asciz "HELLO from "
said_goodbye:   .asciz ": GOODBYE from "
said_button:    .asciz "power button"
said_off:       .asciz "poweroff"
said_deaf:      .asciz "deaf: the power button does nothing now\r\n"
said_help:      .asciz "words: poweroff reboot panic deaf help\r\n"
said_no:        .asciz "no such word; try help\r\n"

# The processor begins 16 bytes below the end of the firmware.
    .org 0xfff0
    jmp start
    .org 0x10000
